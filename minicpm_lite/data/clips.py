"""Clips: a figure that does one thing or two, drawn at any second, and what it does in English and Chinese.

    clip = Clips(seed=0)[5]                  the same one whenever it is asked for
    clip.frame(1.5)                          what is seen after so many seconds, in RGB
    describe_clip(clip.motions, clip.character)   'The robot walks slowly to the left, then it jumps.'

What a clip shows is known exactly: who, what, which way, how fast, and in which order.

Choices, and the traps behind them:

- A figure looks to the right, whichever way it goes. If it turned round, one frame would tell the direction,
  and a model that never compares two frames would seem to see motion.
- So one frame shows who it is and what it does then. Which way, how fast and what came first takes several.
- Slow and fast differ three times, which a frame each half second still tells apart.
- A clip is a function of seed and index alone, as `scenes` are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from ..config import require_positive_integer, require_positive_number
from ..runtime import require_seed
from .assets import load_kenney

__all__ = ["ACTIONS", "CHARACTERS", "Clip", "Clips", "Motion", "describe_clip", "read_description"]

CHARACTERS = {
    "robot": ("robot", "机器人"),
    "zombie": ("zombie", "僵尸"),
    "femalePerson": ("woman", "女人"),
    "malePerson": ("man", "男人"),
    "femaleAdventurer": ("woman with a hat", "戴帽子的女人"),
    "maleAdventurer": ("man with a hat", "戴帽子的男人"),
}
"""The figures of `load_kenney`, with what they are called in English and Chinese."""

ACTIONS = ("walk", "jump", "climb", "stand")
_SPEEDS = {"slowly": 0.05, "fast": 0.15}  # sides of the picture in a second
_WAYS = ("left", "right")
_WALKED, _JUMP = 8.0, 0.25  # pictures a second; height in sides, about once a second
_CLIMBED = 0.07  # sides in a second


@dataclass(frozen=True)
class Motion:
    """One thing that a figure does.

    Attributes:
        action: one of `ACTIONS`.
        way: "left" or "right" of a walk, else None.
        speed: "slowly" or "fast" of a walk, else None.

    Raises:
        ValueError: another action, or a way or a speed of something else than a walk.
    """

    action: str
    way: str | None = None
    speed: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action is {self.action!r}; expected one of {', '.join(ACTIONS)}.")
        walks = self.action == "walk"
        if (self.way in _WAYS, self.speed in _SPEEDS) != (walks, walks) or (
            not walks and (self.way, self.speed) != (None, None)
        ):
            raise ValueError(
                f"{self.action} has the way {self.way!r} and the speed {self.speed!r}; a walk has left or "
                "right and slowly or fast, and nothing else has one."
            )


@dataclass(frozen=True)
class Clip:
    """A figure that does one thing, or two one after the other, each for as long.

    Attributes:
        character: one of `CHARACTERS`.
        motions: one or two.
        start: where its feet are at first, from the left and from the top, in sides of the picture.
        seconds: of the whole clip.
        side: of the picture, in pixels.
    """

    character: str
    motions: tuple[Motion, ...]
    start: tuple[float, float]
    seconds: float = 4.0
    side: int = 96

    def frame(self, second: float) -> Image.Image:
        """What is seen after so many seconds, in RGB.

        Raises:
            ValueError: before the beginning or behind the end.
        """
        if not 0 <= second <= self.seconds:
            raise ValueError(f"The second is {second}; the clip lasts from 0 to {self.seconds:g}.")
        each = self.seconds / len(self.motions)
        (x, y), shown = self.start, "idle"
        for number, motion in enumerate(self.motions):
            passed = min(max(second - number * each, 0.0), each)
            across, up, picture = _moved(motion, passed, each)
            x, y = x + across, y - up
            if second >= number * each:
                shown = picture
        height = round(0.42 * self.side)
        drawn = _drawn(self.character, shown, height)
        left, top = round(x * self.side - drawn.width / 2), round(y * self.side - height)
        picture = Image.new("RGB", (self.side, self.side), (214, 232, 245))
        ground = round(self.start[1] * self.side)
        picture.paste((176, 205, 150), (0, ground, self.side, self.side))
        picture.paste(drawn, (left, top), drawn)
        return picture

    def frames(self, rate: float) -> list[Image.Image]:
        """Frames at a rate a second, from the first on."""
        require_positive_number("rate", rate)
        return [self.frame(number / rate) for number in range(int(self.seconds * rate) or 1)]


@dataclass(frozen=True)
class Clips:
    """Endlessly many clips, each a function of its index.

    Attributes:
        seed: of all of them.
        side: pixels of a picture's side.
        seconds: of each clip.
        most: things that a figure does at most, one or two.

    Raises:
        ValueError: a number that cannot be.
    """

    seed: int
    side: int = 96
    seconds: float = 4.0
    most: int = 2

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_positive_integer("side", self.side)
        require_positive_number("seconds", self.seconds)
        if self.side < 16:
            raise ValueError(f"side is {self.side}; a figure needs at least 16 pixels.")
        if not 0.5 <= self.seconds <= 4.5:
            raise ValueError(
                f"seconds is {self.seconds}; expected 0.5 to 4.5, in which a figure stays in the picture."
            )
        if self.most not in (1, 2):
            raise ValueError(f"most is {self.most}; a figure does one thing or two.")

    def __getitem__(self, index: int) -> Clip:
        """The clip of an index, counted from 0."""
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise IndexError(f"The index is {index!r}; clips are counted from 0.")
        luck = random.Random(f"{self.seed}/{index}")
        actions = luck.sample(ACTIONS, luck.randint(1, self.most))
        motions = tuple(
            Motion(action, luck.choice(_WAYS), luck.choice([*_SPEEDS]))
            if action == "walk"
            else Motion(action)
            for action in actions
        )
        each = self.seconds / len(motions)
        across = sum(_moved(motion, each, each)[0] for motion in motions)
        room = 0.16, 0.84  # for the figure's width
        x = luck.uniform(max(room[0], room[0] - across), min(room[1], room[1] - across))
        return Clip(
            luck.choice([*CHARACTERS]), motions, (x, luck.uniform(0.88, 0.96)), self.seconds, self.side
        )


def describe_clip(motions: Sequence[Motion], character: str, language: str = "en") -> str:
    """What a figure does, as a sentence.

    >>> describe_clip([Motion("walk", "left", "slowly"), Motion("jump")], "robot")
    'The robot walks slowly to the left, then it jumps.'
    >>> describe_clip([Motion("climb"), Motion("walk", "right", "fast")], "zombie", "zh")
    '僵尸先往上爬，然后快快地向右走。'
    """
    if language not in ("en", "zh"):
        raise ValueError(f"language is {language!r}; expected one of en, zh.")
    who = CHARACTERS[character][language == "zh"]
    does = [_said(motion, language) for motion in motions]
    if language == "en":
        return f"The {who} {', then it '.join(does)}."
    return f"{who}{'先' if len(does) > 1 else ''}{'，然后'.join(does)}。"


def read_description(sentence: str) -> tuple[str, tuple[Motion, ...]]:
    """Who does what, by a sentence of `describe_clip` in either language.

    Raises:
        ValueError: no clip is described so.
    """
    if (found := _descriptions().get(sentence)) is None:
        raise ValueError(f"{sentence!r} describes no clip; see minicpm_lite.data.clips.describe_clip.")
    return found


@cache
def _descriptions() -> dict[str, tuple[str, tuple[Motion, ...]]]:
    walks = [Motion("walk", way, speed) for way in _WAYS for speed in _SPEEDS]
    single = walks + [Motion(action) for action in ACTIONS if action != "walk"]
    pairs = [(one, two) for one in single for two in single if one.action != two.action]
    return {
        describe_clip(motions, who, language): (who, motions)
        for motions in [*((motion,) for motion in single), *pairs]
        for who in CHARACTERS
        for language in ("en", "zh")
    }


def _said(motion: Motion, language: str) -> str:
    if motion.action == "walk":
        if language == "en":
            return f"walks {motion.speed} to the {motion.way}"
        return (
            f"{'慢慢' if motion.speed == 'slowly' else '快快'}地向{'左' if motion.way == 'left' else '右'}走"
        )
    english = {"jump": "jumps", "climb": "climbs up", "stand": "stands still"}
    chinese = {"jump": "跳起来", "climb": "往上爬", "stand": "站着不动"}
    return (english if language == "en" else chinese)[motion.action]


def _moved(motion: Motion, passed: float, seconds: float) -> tuple[float, float, str]:
    """How far to the right and up a motion of some seconds has brought a figure by now, and its picture."""
    if motion.action == "walk":
        across = _SPEEDS[motion.speed] * passed * (1 if motion.way == "right" else -1)
        return across, 0.0, f"walk{int(passed * _WALKED) % 8}"
    if motion.action == "jump":
        part = passed * max(1, round(seconds)) / seconds % 1  # at the end it is on the ground
        return 0.0, _JUMP * 4 * part * (1 - part), "jump" if part < 0.5 else "fall"
    if motion.action == "climb":
        return 0.0, _CLIMBED * passed, f"climb{int(passed * 4) % 2}"
    return 0.0, 0.0, "idle"


@cache
def _drawn(character: str, picture: str, height: int) -> Image.Image:
    image = load_kenney()[character][picture].convert("RGBA")
    return image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)
