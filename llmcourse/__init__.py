"""Serve, measure, fine-tune, reinforce, export and chat with your own Llama."""
__version__ = "0.1.0"
