"""A headline claim with the published and the measured figure side by side.

The output shows a table. It also carries the record as JSON under a mime type of its own, from which the
book's evidence page is built, so that page cannot say anything the chapters did not measure.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from ..runtime import require_seed
from .display import pipe_table, plain_table

MIME = "application/vnd.minicpm-lite.evidence+json"
Verdict = Literal[
    "verified", "reproduced", "direction only", "not told apart", "not at this scale", "refuted as described"
]
# A sign beside the word, so that colour is never the only carrier.
ICONS: dict[Verdict, str] = dict(zip(get_args(Verdict), "≡✓↗≈○✗", strict=True))
_LINK = re.compile(r"\[([^\]]+)\]\(https?://[^\s)]+\)")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One claim and what became of it here. Make it the last expression of a cell.

    Attributes:
        claim: the claim in one sentence.
        published: the published figure, with its unit.
        source: a link to the publication and the place in it, e.g.
            ``"[Hu et al., 2024](https://arxiv.org/abs/2404.06395), section 4.3"``.
        published_scale: model size, data and device of the publication.
        measured: our figure, with its unit and its spread.
        scale: model size and data here.
        seeds: the seeds of the runs; empty for an exact count.
        device: `minicpm_lite.lab.device()`.
        minutes: how long the measurement took.
        verdict: "verified", an identity or an exact count, which can fail only through a fault of ours;
            "reproduced", the published effect under the rule and the power that were named before; "direction
            only", the same sign beyond noise, and not the published size or form; "not told apart", the
            interval holds both; "not at this scale", absent or the other way beyond noise, with the reason
            tried; "refuted as described", a common description that is wrong by derivation or exactly.

    Raises:
        ValueError: a text is empty, the source has no link, the verdict is another word, or the seeds are no
            list of whole numbers.
    """

    claim: str
    published: str
    source: str
    published_scale: str
    measured: str
    scale: str
    seeds: Sequence[int]
    device: str
    minutes: float
    verdict: Verdict

    def __post_init__(self) -> None:
        if isinstance(self.seeds, str | bytes) or not isinstance(self.seeds, Sequence):
            raise ValueError(
                f"seeds is {self.seeds!r}; expected a list of seeds, such as [0, 1, 2], or [] for a count."
            )
        for seed in self.seeds:
            require_seed(seed)
        for field, value in asdict(self).items():
            if field not in ("seeds", "minutes") and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"{field} is {value!r}; expected a few words.")
        if not _LINK.search(self.source):
            raise ValueError(
                f"source is {self.source!r}; expected a link and the place, such as "
                "'[Hu et al., 2024](https://arxiv.org/abs/2404.06395), section 4.3'."
            )
        if self.verdict not in ICONS:
            raise ValueError(f"verdict is {self.verdict!r}; expected one of {', '.join(ICONS)}.")

    def record(self) -> dict[str, object]:
        """What the evidence page reads: the fields, with plain lists and numbers."""
        return asdict(self) | {"seeds": list(self.seeds), "minutes": round(float(self.minutes), 1)}

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        seeds = (
            f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed" if self.seeds else "exact count"
        )
        run = f"{seeds}, {self.device}, {self.record()['minutes']:g} min"
        headers, numeric = ["Compared", "Published", "Measured here"], [False] * 3
        rows = [["Figure", self.published, self.measured], ["Scale", self.published_scale, self.scale]]
        verdict = f"{ICONS[self.verdict]} {self.verdict}"
        plain = plain_table([*rows, ["From", _LINK.sub(r"\1", self.source), run]], headers, numeric)
        pipes = pipe_table([*rows, ["From", self.source, run]], headers, numeric)
        return {
            "text/plain": f"Claim: {self.claim}\n{plain}\nVerdict: {verdict}",
            "text/markdown": f"**Claim.** {self.claim}\n\n{pipes}\n\n**Verdict:** {verdict}",
            MIME: self.record(),
        }
