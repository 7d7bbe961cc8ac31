"""What is done to the images of a batch on its device, and the random choices for it.

`choices.ChoiceDrawer` turns (step key, sample indices) into every random choice of a batch;
`pipeline.Augmenter` is a pure function of the uint8 batch and those choices, and can be checked
image by image. Their order stands there; `config.builtins.AUGMENTATIONS` names what has no key.
"""

from dist_resnet.augment.choices import ChoiceDrawer as ChoiceDrawer
from dist_resnet.augment.choices import Choices as Choices
from dist_resnet.augment.normalisation import Normalisation as Normalisation
from dist_resnet.augment.normalisation import normalise as normalise
from dist_resnet.augment.pipeline import Augmenter as Augmenter
from dist_resnet.augment.pipeline import within_kernels as within_kernels
