"""RabbitMQ for Umbel: transport, and results by reply queues"""
