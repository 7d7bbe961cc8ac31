"""What the short names of a configuration stand for; names of your own stand for themselves."""

_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "m6")
MODELS = dict.fromkeys(_RESNETS, "dist_resnet.models.resnet:resnet")
OPTIMIZERS = {
    "sgd": "dist_resnet.optim.sgd:FlatSGD",
    "muon": "dist_resnet.optim.muon:FlatMuon",
}
AUGMENTATIONS = {
    "erasing": "dist_resnet.augment.erase:erasing",
    "jitter": "dist_resnet.augment.colour:jitter",
}
DATASETS = {
    "cifar10": (50_000, 32, 32),
    "cifar100": (50_000, 32, 32),
    "digits": (1_437, 32, 32),
    "synthetic": None,
}
"""What a training prepares where it is missing: images, height and width, where these are known."""
