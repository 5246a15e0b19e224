"""Umbel among Celery: its Redis layout, remote control, events, signed messages and settings"""
