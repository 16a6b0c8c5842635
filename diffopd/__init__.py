"""On-policy distillation of diffusion models, through stock diffusers pipelines."""

__version__ = "0.1.0"
