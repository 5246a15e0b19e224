"""What every pool of child processes of Umbel is made of: fork server, channel, shared memory, and the two ways to run jobs."""
