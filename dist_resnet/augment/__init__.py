"""What is done to the images of a batch on its device, and the random choices for it.

`choices.ChoiceDrawer` turns (step key, sample indices) into every random choice of a batch;
`pipeline.Augmenter` is a pure function of the uint8 batch and those choices, and can be checked
image by image. What there is stands in `pipeline.ORDER` and `config.builtins.AUGMENTATIONS`.
"""

from dist_resnet.augment.choices import ChoiceDrawer as ChoiceDrawer
from dist_resnet.augment.choices import Choices as Choices
from dist_resnet.augment.choices import dropout_factors as dropout_factors
from dist_resnet.augment.erase import cutout as cutout
from dist_resnet.augment.geometry import crop as crop
from dist_resnet.augment.geometry import flip as flip
from dist_resnet.augment.mix import beta_quantiles as beta_quantiles
from dist_resnet.augment.mix import mixup as mixup
from dist_resnet.augment.normalisation import Normalisation as Normalisation
from dist_resnet.augment.normalisation import normalise as normalise
from dist_resnet.augment.pipeline import Augmenter as Augmenter
from dist_resnet.augment.pipeline import augment as augment
from dist_resnet.augment.pipeline import augment_by_torch as augment_by_torch
from dist_resnet.augment.pipeline import within_kernels as within_kernels
