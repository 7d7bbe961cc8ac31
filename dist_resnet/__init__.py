"""Train small ResNets from a laptop CPU to many GPUs; a run is a function of its configuration."""

__version__ = "0.1.0"
