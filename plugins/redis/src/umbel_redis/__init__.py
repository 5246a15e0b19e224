"""Redis and Valkey for Umbel: transport on streams, result store, scheduler store"""
