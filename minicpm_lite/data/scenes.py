"""Scenes: emoji at known places, so that what is true of a picture is known exactly.

    scenes = Scenes(seed=0)
    scene = scenes[7]                       the same one whenever it is asked for
    scene.draw()                            its picture, in RGB
    `minicpm_lite.data.scene_language`      what is true of it, in English and Chinese

A real photograph's caption says some of what is there, and nobody knows what else is. Here each thing has a
kind, a colour if its name says one, a place and a size, so that every statement can be checked.

Choices, and the traps behind them:

- A scene is a function of seed and index alone, so it is a window for a trainer: nothing is stored, and a
  resumed run sees what it would have seen.
- Things stand in cells of a grid and never overlap. So "left of" has one meaning.
- Pictures are white, since the emoji stand on white.
- Two emoji that look alike at this size, such as ship and ferry, are not both used.
- Seeds go through a string, which Python turns into the same numbers on every machine and in every version.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ..config import require_positive_integer
from ..runtime import require_seed
from .assets import Emoji, load_emoji

__all__ = ["COLOURS", "SCENE_KINDS", "Kind", "Scene", "Scenes", "Thing"]

COLOURS = {
    "red": "红", "pink": "粉", "orange": "橙", "yellow": "黄", "green": "绿", "blue": "蓝", "purple": "紫",
    "brown": "棕", "black": "黑", "grey": "灰", "white": "白",
}  # fmt: skip
"""The colours that things are said to have, with the character that Chinese puts before 色."""


@dataclass(frozen=True)
class Kind:
    """A kind of thing, and what it is called.

    Attributes:
        english: its name.
        plural: of several.
        chinese: its name.
        measure: the word between a number and the name in Chinese.
        pictures: the English caption of its emoji, by colour; None for one whose colour is not spoken of.
    """

    english: str
    plural: str
    chinese: str
    measure: str
    pictures: tuple[tuple[str | None, str], ...]


def _kind(line: str) -> Kind:
    """``english, plural, chinese, measure[, [colour:]caption, ...]``; left out, the caption is the name."""
    english, plural, chinese, measure, *captions = (part.strip() for part in line.split(","))
    pictures = []
    for caption in captions or [english]:
        colour, _, name = caption.rpartition(":")
        pictures.append((colour or None, name))
    return Kind(english, plural, chinese, measure, tuple(pictures))


SCENE_KINDS = {
    kind.english: kind
    for kind in map(
        _kind,
        """
        dog, dogs, 狗, 只
        cat, cats, 猫, 只
        monkey, monkeys, 猴子, 只
        horse, horses, 马, 匹
        cow, cows, 奶牛, 头
        pig, pigs, 猪, 头
        sheep, sheep, 绵羊, 只
        elephant, elephants, 大象, 头
        rabbit, rabbits, 兔子, 只
        hedgehog, hedgehogs, 刺猬, 只
        penguin, penguins, 企鹅, 只
        duck, ducks, 鸭子, 只
        owl, owls, 猫头鹰, 只
        swan, swans, 天鹅, 只
        flamingo, flamingos, 火烈鸟, 只
        parrot, parrots, 鹦鹉, 只
        turtle, turtles, 乌龟, 只
        snake, snakes, 蛇, 条
        whale, whales, 鲸鱼, 头
        fish, fish, 鱼, 条
        octopus, octopuses, 章鱼, 只
        crab, crabs, 螃蟹, 只
        snail, snails, 蜗牛, 只
        butterfly, butterflies, 蝴蝶, 只
        bee, bees, 蜜蜂, 只, honeybee
        ant, ants, 蚂蚁, 只
        apple, apples, 苹果, 个, red:red apple, green:green apple
        banana, bananas, 香蕉, 根
        lemon, lemons, 柠檬, 个
        peach, peaches, 桃子, 个
        strawberry, strawberries, 草莓, 颗
        pineapple, pineapples, 菠萝, 个
        carrot, carrots, 胡萝卜, 根
        mushroom, mushrooms, 蘑菇, 个
        egg, eggs, 鸡蛋, 个
        hamburger, hamburgers, 汉堡, 个
        doughnut, doughnuts, 甜甜圈, 个
        cookie, cookies, 饼干, 块
        cake, cakes, 蛋糕, 个, birthday cake
        car, cars, 汽车, 辆, automobile
        bus, buses, 公交车, 辆
        taxi, taxis, 出租车, 辆
        bicycle, bicycles, 自行车, 辆
        tractor, tractors, 拖拉机, 辆
        truck, trucks, 货车, 辆, delivery truck
        aeroplane, aeroplanes, 飞机, 架, airplane
        helicopter, helicopters, 直升机, 架
        rocket, rockets, 火箭, 枚
        sailboat, sailboats, 帆船, 艘
        ship, ships, 轮船, 艘
        heart, hearts, 心, 颗, pink:pink heart, orange:orange heart, yellow:yellow heart, green:green heart,
            blue:blue heart, purple:purple heart, brown:brown heart, black:black heart, grey:grey heart,
            white:white heart, red:heavy black heart
        book, books, 书, 本, green:green book, blue:blue book, orange:orange book
        football, footballs, 足球, 个, soccer ball
        guitar, guitars, 吉他, 把
        violin, violins, 小提琴, 把
        trumpet, trumpets, 小号, 把
        chair, chairs, 椅子, 把
        bed, beds, 床, 张
        door, doors, 门, 扇
        camera, cameras, 相机, 台
        television, televisions, 电视机, 台
        hammer, hammers, 锤子, 把
        axe, axes, 斧头, 把
        crown, crowns, 皇冠, 顶
        bell, bells, 铃铛, 个
        kite, kites, 风筝, 个
        candle, candles, 蜡烛, 根
        tree, trees, 树, 棵, deciduous tree
        cactus, cactuses, 仙人掌, 棵
        rose, roses, 玫瑰, 朵
        sunflower, sunflowers, 向日葵, 朵
        tulip, tulips, 郁金香, 朵
        """.replace(",\n            ", ", ")  # a kind of many colours goes on in the next lines
        .strip()
        .splitlines(),
    )
}
"""The kinds of things, by their English names."""

_SIZES = (0.5, 0.8, 1.0)  # of a cell
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"  # none that is taken for another


@dataclass(frozen=True)
class Thing:
    """One thing: its kind and colour, and the square in which it is drawn, in pixels."""

    kind: str
    colour: str | None
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Scene:
    """Things on a square picture, and perhaps a sign with letters.

    Attributes:
        things: none overlaps another.
        text: what stands on the sign, or None if there is none.
        sign: left, top, width and height of the sign, in pixels; None with the text.
        side: of the picture, in pixels.
    """

    things: tuple[Thing, ...]
    text: str | None = None
    sign: tuple[int, int, int, int] | None = None
    side: int = 192

    def draw(self) -> Image.Image:
        """The picture, in RGB."""
        picture = Image.new("RGB", (self.side, self.side), "white")
        for thing in self.things:
            drawn = _drawn(dict(SCENE_KINDS[thing.kind].pictures)[thing.colour], thing.side)
            picture.paste(drawn, (thing.left, thing.top))
        if self.text is not None:
            left, top, width, height = self.sign
            canvas = ImageDraw.Draw(picture)
            edge = (left, top, left + width - 1, top + height - 1)
            canvas.rectangle(edge, fill="white", outline=(90, 60, 30), width=2)
            font = ImageFont.load_default(size=height * 0.62)
            middle = (left + width / 2, top + height / 2)
            canvas.text(middle, self.text, fill="black", font=font, anchor="mm")
        return picture


@dataclass(frozen=True)
class Scenes:
    """Endlessly many scenes, each a function of its index.

    Attributes:
        seed: of all of them.
        side: pixels of a picture's side, a multiple of ``cell``.
        cell: pixels of a cell's side, at least 16; each holds one thing at most.
        most: things at most.
        signs: the share of scenes with a sign.
        kinds: what there may be, by English names; left out, all.

    Raises:
        ValueError: sizes that do not fit, no room for so many things, or an unknown kind.

    >>> Scenes(seed=0)[3] == Scenes(seed=0)[3]
    True
    """

    seed: int
    side: int = 192
    cell: int = 48
    most: int = 6
    signs: float = 0.25
    kinds: Sequence[str] | None = None

    def __post_init__(self) -> None:
        require_seed(self.seed)
        for name in ("side", "cell", "most"):
            require_positive_integer(name, getattr(self, name))
        if self.cell < 16 or self.side % self.cell:
            raise ValueError(
                f"side is {self.side} and cell {self.cell}; expected cells of at least 16 pixels, and a side "
                "that is a multiple of that."
            )
        if self.most + 2 > (self.side // self.cell) ** 2:
            raise ValueError(
                f"{self.most} things and a sign need {self.most + 2} cells; there are "
                f"{(self.side // self.cell) ** 2}."
            )
        if not 0 <= self.signs <= 1:
            raise ValueError(f"signs is {self.signs}; expected a share from 0 to 1.")
        object.__setattr__(self, "kinds", tuple(SCENE_KINDS if self.kinds is None else self.kinds))
        if unknown := [kind for kind in self.kinds if kind not in SCENE_KINDS]:
            raise ValueError(f"There is no kind {unknown[0]!r}; see minicpm_lite.data.scenes.SCENE_KINDS.")
        if len(set(self.kinds)) < 2:
            raise ValueError("There is only one kind; give at least two, so that scenes differ.")

    def __getitem__(self, index: int) -> Scene:
        """The scene of an index, counted from 0."""
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise IndexError(f"The index is {index!r}; scenes are counted from 0.")
        luck = random.Random(f"{self.seed}/{index}")
        across = self.side // self.cell
        free = [(column, row) for row in range(across) for column in range(across)]
        text = sign = None
        if luck.random() < self.signs:
            column, row = luck.randrange(across - 1), luck.randrange(across)
            free = [cell for cell in free if cell not in ((column, row), (column + 1, row))]
            text = "".join(luck.choices(_LETTERS, k=luck.randint(2, 4)))
            sign = (self.cell * column + 2, self.cell * row + 4, 2 * self.cell - 4, self.cell - 8)
        wanted = luck.randint(1, self.most)
        things = []
        for kind in luck.sample(self.kinds, len(self.kinds)):
            if not wanted:
                break
            count = min(luck.choice((1, 1, 1, 2, 3, 4)), wanted)
            colours = [colour for colour, _ in SCENE_KINDS[kind].pictures]
            scale = luck.choice(_SIZES)  # things of one kind are equally large
            for _ in range(count):
                column, row = free.pop(luck.randrange(len(free)))
                side = round(scale * self.cell)
                left, top = (luck.randint(0, self.cell - side) for _ in range(2))
                things.append(
                    Thing(kind, luck.choice(colours), self.cell * column + left, self.cell * row + top, side)
                )
            wanted -= count
        return Scene(tuple(things), text, sign, self.side)


@cache
def _emoji() -> dict[str, Emoji]:
    return {each.english: each for each in load_emoji()}


@cache
def _drawn(caption: str, side: int) -> Image.Image:
    image = _emoji()[caption].image.convert("RGB")  # on white, as the sheet has them
    return image.resize((side, side), Image.Resampling.LANCZOS)
