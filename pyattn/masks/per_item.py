"""A mask for each item of a batch."""

from __future__ import annotations

import dataclasses

from ..checks import DtypeError, ShapeError
from .algebra import Mask, broadcast_leads
from .placement import Frame


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class per_item(Mask):
    """One mask for each item of a batch axis.

    Parameters
    ----------
    masks : sequence of Mask
        ``masks[b]`` is item b's; each may have leading axes of its own, which follow the batch
        axis. Nested, they make several batch axes. Equal masks are compiled once.

    Examples
    --------
    >>> from pyattn import masks
    >>> mask = masks.per_item([masks.global_tokens([0]), masks.global_tokens([1, 2])])
    >>> mask.lead                                   # two items, all heads alike
    (2, 1)
    >>> mask.dense(1, 4).astype(int)[:, 0, 0]       # what the last query sees
    array([[1, 0, 0, 0],
           [0, 1, 1, 0]])
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        self._set(masks=tuple(self.masks))
        if not self.masks:
            raise ShapeError("per_item takes at least one mask; got none")
        for item, mask in enumerate(self.masks):
            if not isinstance(mask, Mask):
                raise DtypeError(f"per_item takes masks; item {item} is a {type(mask).__name__}")
        broadcast_leads(*self.masks)

    @property
    def lead(self) -> tuple[int, ...]:
        return (len(self.masks), *(broadcast_leads(*self.masks) or (1,)))

    def at(self, index: tuple[int, ...]) -> Mask:
        return self.masks[index[0]].pick(index[1:])

    def resolve(self, frame: Frame) -> Mask:
        if len(self.masks) > 1:
            raise ShapeError(f"per_item of {len(self.masks)} masks must be picked by item first")
        return self.masks[0].resolve(frame)

    def __repr__(self) -> str:
        return f"per_item([{', '.join(map(repr, self.masks))}])"
