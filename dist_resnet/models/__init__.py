"""Models: ResNets, and the contract that any other net has to keep."""
