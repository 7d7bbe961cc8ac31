"""Models: ResNets for images of CIFAR's size."""
