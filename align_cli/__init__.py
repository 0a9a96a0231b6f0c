"""t2ialign: make text-to-image diffusion models follow their prompts, and prove it with numbers."""

__version__ = "0.1.0"
