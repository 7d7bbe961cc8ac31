"""What may be wrong with a data set, and what is said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_resnet.base.errors import UserError
from dist_resnet.data.images import tell

_NAMED = 5  # damaged images in the one line of an error; if there are more, each has its own before


@dataclass(frozen=True)
class Tolerance:
    """What may be wrong with a data set.

    `damaged`: so many images of each of the two sets may be left out. `missing`: a class may have
    no test images.
    """

    damaged: int = 0
    missing: bool = False

    def judge(self, sets: Mapping[str, Sequence[str]]) -> None:
        """Refuse more damaged images in one of the sets, or say what is left out.

        `sets`: a line for each damaged image of the set of this name.
        """
        damaged = [line for lines in sets.values() for line in lines]
        most = max(map(len, sets.values()))
        if most <= self.damaged or len(damaged) > _NAMED:
            for line in damaged:
                tell(f"damaged: {line}")
        if most <= self.damaged:
            for name, lines in sets.items():
                if lines:
                    tell(f"left out {len(lines):,} damaged images of {name}")
            return
        count = f"{len(damaged):,} damaged images: " if len(damaged) > 1 else ""
        more = f"; and {len(damaged) - _NAMED:,} more" if len(damaged) > _NAMED else ""
        allowed = f", not {self.damaged:,}" if self.damaged else ""
        raise UserError(
            f"{count}{'; '.join(damaged[:_NAMED])}{more}; "
            f"or leave out so many of each set: --skip-damaged {most}{allowed}"
        )


STRICT = Tolerance()
