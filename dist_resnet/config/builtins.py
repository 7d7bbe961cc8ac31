"""What the short names of a configuration stand for; names of your own stand for themselves."""

MODELS = {
    "resnet20": "dist_resnet.models.resnet:resnet",
    "resnet32": "dist_resnet.models.resnet:resnet",
    "resnet44": "dist_resnet.models.resnet:resnet",
    "resnet56": "dist_resnet.models.resnet:resnet",
    "resnet110": "dist_resnet.models.resnet:resnet",
    "m6": "dist_resnet.models.resnet:resnet",
}
OPTIMIZERS = {
    "sgd": "dist_resnet.optim.sgd:FlatSGD",
    "muon": "dist_resnet.optim.muon:FlatMuon",
}
AUGMENTATIONS = {
    "erasing": "dist_resnet.augment.erase:erasing",
    "jitter": "dist_resnet.augment.colour:jitter",
}
