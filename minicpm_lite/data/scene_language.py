"""What is said of scenes, in English and Chinese: one grammar that writes, reads and checks.

    claim = Number(Noun("apple", "red"), 2)
    write_claim(claim, "en")               'There are two red apples.'
    write_claim(claim, "zh")               '有两个红色的苹果。'
    read_claim("There are two red apples.") == claim
    is_true(claim, scene)              True or False

A claim is atomic: it is true or false of a scene as a whole. A caption is several, one sentence each, and so
it can be taken apart again, and each sentence checked.

Choices, and the traps behind them:

- Every sentence has one meaning and every claim one sentence in each language. So `read_claim` is the inverse
  of `write_claim`, and what is read as no claim is refused, not guessed.
- "There is one dog" is false where there are two.
- "The dog" speaks of the only one. Where there is none, or are several, a claim about it is false.
- "Left of" asks that the whole thing lies further left; so two things can be in no order at all. "Larger"
  asks for a fifth more of the side, which can be seen.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

from .scenes import COLOURS, SCENE_KINDS, Scene, Thing

__all__ = [
    "Claim",
    "Colour",
    "Larger",
    "Noun",
    "Number",
    "Position",
    "Text",
    "ask_whether",
    "caption",
    "claims_of",
    "false_claim",
    "is_true",
    "questions",
    "read_claim",
    "read_caption",
    "read_question",
    "write_claim",
]

LANGUAGES = ("en", "zh")
NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("没有", "一", "两", "三", "四", "五", "六", "七", "八", "九"),
}
POSITIONS = {"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}
_CLEAR = 1.2  # how many times as long the side of a larger thing is at least


@dataclass(frozen=True)
class Noun:
    """A kind of thing, of any colour or of one."""

    kind: str
    colour: str | None = None

    def matches(self, thing: Thing) -> bool:
        """Whether a thing is of this kind and colour."""
        return thing.kind == self.kind and self.colour in (None, thing.colour)


@dataclass(frozen=True)
class Number:
    """There are so many of them, from none to nine."""

    noun: Noun
    number: int


@dataclass(frozen=True)
class Colour:
    """The only one of a kind has this colour."""

    kind: str
    colour: str


@dataclass(frozen=True)
class Position:
    """The one lies left of, right of, above or below the other."""

    noun: Noun
    where: str
    other: Noun


@dataclass(frozen=True)
class Larger:
    """The one is larger than the other."""

    noun: Noun
    other: Noun


@dataclass(frozen=True)
class Text:
    """These letters stand on the sign."""

    text: str


Claim = Number | Colour | Position | Larger | Text


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether a claim is true of a scene."""
    match claim:
        case Number(noun, number):
            return sum(map(noun.matches, scene.things)) == number
        case Colour(kind, colour):
            thing = _only(Noun(kind), scene)
            return thing is not None and thing.colour == colour
        case Position(noun, where, other):
            one, two = _only(noun, scene), _only(other, scene)
            return one is not None and two is not None and where in _positions(one, two)
        case Larger(noun, other):
            one, two = _only(noun, scene), _only(other, scene)
            return one is not None and two is not None and one.side >= _CLEAR * two.side
        case Text(text):
            return scene.text == text


def write_claim(claim: Claim, language: str = "en") -> str:
    """A claim as a sentence.

    >>> write_claim(Position(Noun("dog"), "left of", Noun("heart", "blue")))
    'The dog is left of the blue heart.'
    >>> write_claim(Larger(Noun("dog"), Noun("apple", "red")), "zh")
    '狗比红色的苹果大。'
    """
    _require_language(language)
    english = language == "en"
    match claim:
        case Number(noun, number):
            said = NUMBERS[language][number]
            if english:
                return f"There {'is' if number == 1 else 'are'} {said} {_name(noun, 'en', number != 1)}."
            measure = SCENE_KINDS[noun.kind].measure if number else ""
            return f"{'有' if number else ''}{said}{measure}{_name(noun, 'zh')}。"
        case Colour(kind, colour):
            name = _name(Noun(kind), language)
            return f"The {name} is {colour}." if english else f"{name}是{COLOURS[colour]}色的。"
        case Position(noun, where, other):
            one, two = _name(noun, language), _name(other, language)
            return f"The {one} is {where} the {two}." if english else f"{one}在{two}的{POSITIONS[where]}。"
        case Larger(noun, other):
            one, two = _name(noun, language), _name(other, language)
            return f"The {one} is larger than the {two}." if english else f"{one}比{two}大。"
        case Text(text):
            return f"The sign says {text}." if english else f"牌子上写着{text}。"


def ask_whether(claim: Claim, language: str = "en") -> str:
    """A claim as a question that is answered by yes or no.

    >>> ask_whether(Number(Noun("fish"), 2)), ask_whether(Text("K7"), "en"), ask_whether(Text("K7"), "zh")
    ('Are there two fish?', 'Does the sign say K7?', '牌子上写着K7吗？')
    """
    sentence = write_claim(claim, language)[:-1]
    if language == "zh":
        return f"{sentence}吗？"
    if isinstance(claim, Text):
        return f"Does the sign say {claim.text}?"
    if isinstance(claim, Number):
        return f"{'Is' if claim.number == 1 else 'Are'} there {sentence.split(maxsplit=2)[2]}?"
    subject, rest = sentence.split(" is ", 1)
    return f"Is {subject[0].lower()}{subject[1:]} {rest}?"


def read_claim(sentence: str) -> Claim:
    """The claim that a sentence makes, in either language.

    Raises:
        ValueError: no claim is written so.

    >>> read_claim("没有狗。")
    Number(noun=Noun(kind='dog', colour=None), number=0)
    """
    end = "。" if sentence.endswith("。") else "."
    claim = _read(sentence[:-1], "zh" if end == "。" else "en") if sentence.endswith(end) else None
    if claim is None:
        raise ValueError(f"{sentence!r} is no claim of this grammar; see minicpm_lite.data.scene_language.")
    return claim


def read_question(question: str) -> Claim:
    """The claim about which `ask_whether` asks.

    Raises:
        ValueError: no question is written so.
    """
    claim = None
    if question.endswith("吗？"):
        claim = _read(question[:-2], "zh")
    elif question.startswith("Does the sign say ") and question.endswith("?"):
        claim = _read(f"The sign says {question[18:-1]}", "en")
    elif question.startswith(("Is there ", "Are there ")) and question.endswith("?"):
        verb, _, rest = question[:-1].split(maxsplit=2)
        claim = _read(f"There {verb.lower()} {rest}", "en")
    elif question.startswith("Is the ") and question.endswith("?"):
        words = question[7:-1].split(" ")
        # where the subject ends is not marked: the first place at which it makes a claim
        found = [
            _read(f"The {' '.join(words[:n])} is {' '.join(words[n:])}", "en") for n in range(1, len(words))
        ]
        claim = next((each for each in found if each is not None), None)
    if claim is None:
        raise ValueError(f"{question!r} is no question of this grammar; see `ask_whether`.")
    return claim


def claims_of(scene: Scene) -> list[Claim]:
    """All true claims about the things of a scene; none about what is not there."""
    nouns = sorted({noun for thing in scene.things for noun in _nouns(thing)}, key=str)
    single = [noun for noun in nouns if _only(noun, scene)]
    claims: list[Claim] = [Number(noun, sum(map(noun.matches, scene.things))) for noun in nouns]
    claims += [Colour(thing.kind, thing.colour) for thing in scene.things if thing.colour]
    for one, two in product(single, repeat=2):
        claims += [Position(one, where, two) for where in POSITIONS] + [Larger(one, two)]
    if scene.text is not None:
        claims.append(Text(scene.text))
    return [claim for claim in claims if is_true(claim, scene)]


def false_claim(scene: Scene, luck: random.Random) -> Claim:
    """A claim that is false of a scene, and near to one that is true: one word is another one."""
    for _ in range(1000):
        claim = luck.choice(claims_of(scene))
        match claim:
            case Number(noun, number):
                wrong = luck.choice(
                    (Number(noun, luck.randint(0, 6)), Number(Noun(luck.choice([*SCENE_KINDS])), number))
                )
            case Colour(kind, _):
                wrong = Colour(kind, luck.choice([colour for colour, _ in SCENE_KINDS[kind].pictures]))
            case Position(noun, _, other):
                wrong = Position(noun, luck.choice([*POSITIONS]), other)
            case Larger(noun, other):
                wrong = Larger(other, noun)
            case Text(text):
                place = luck.randrange(len(text))
                wrong = Text(text[:place] + luck.choice("ABCDEFGH23456789") + text[place + 1 :])
        if not is_true(wrong, scene):
            return wrong
    raise ValueError("No false claim was found in a thousand tries.")  # a scene of which all is said


def caption(scene: Scene, luck: random.Random, language: str = "en", most: int = 6) -> str:
    """True sentences about a scene: how many there are of each kind, and some of the rest.

    Args:
        scene: what is described.
        luck: chooses and orders the rest.
        language: "en" or "zh".
        most: sentences at most.
    """
    kinds = list(dict.fromkeys(thing.kind for thing in scene.things))
    first = [Number(Noun(kind), sum(thing.kind == kind for thing in scene.things)) for kind in kinds]
    if scene.text is not None:
        first.append(Text(scene.text))
    rest = [claim for claim in claims_of(scene) if claim not in first]
    luck.shuffle(rest)
    sentences = [write_claim(claim, language) for claim in (first + rest)[:most]]
    return (" " if language == "en" else "").join(sentences)


def read_caption(text: str) -> list[Claim]:
    """The claims of a caption, in either language.

    Raises:
        ValueError: a sentence that is no claim.
    """
    end = "。" if "。" in text else "."
    return [read_claim(sentence.strip() + end) for sentence in text.split(end) if sentence.strip()]


def questions(scene: Scene, luck: random.Random, language: str = "en") -> list[tuple[str, str]]:
    """Questions about a scene with their answers, of each kind that can be asked, in random order.

    As many are answered by yes as by no.
    """
    _require_language(language)
    english = language == "en"
    found = []
    for claim in claims_of(scene):
        match claim:
            case Number(noun, number):
                name, measure = _name(noun, language, plural=True), SCENE_KINDS[noun.kind].measure
                said = NUMBERS[language][number]
                found.append(
                    (f"How many {name} are there?", said)
                    if english
                    else (f"有几{measure}{name}？", said + measure)
                )
            case Colour(kind, colour):
                name = _name(Noun(kind), language)
                found.append(
                    (f"What colour is the {name}?", colour)
                    if english
                    else (f"{name}是什么颜色的？", COLOURS[colour] + "色")
                )
            case Text(text):
                found.append(("What does the sign say?" if english else "牌子上写着什么？", text))
    yes, no = ("yes", "no") if english else ("对", "不对")
    for _ in range(max(1, len(found) // 2)):
        found.append((ask_whether(luck.choice(claims_of(scene)), language), yes))
        found.append((ask_whether(false_claim(scene, luck), language), no))
    luck.shuffle(found)
    return found


def _only(noun: Noun, scene: Scene) -> Thing | None:
    """The only thing that a noun can mean."""
    matching = [thing for thing in scene.things if noun.matches(thing)]
    return matching[0] if len(matching) == 1 else None


def _positions(one: Thing, two: Thing) -> set[str]:
    tests = {
        "left of": one.left + one.side <= two.left,
        "right of": two.left + two.side <= one.left,
        "above": one.top + one.side <= two.top,
        "below": two.top + two.side <= one.top,
    }
    return {where for where, is_so in tests.items() if is_so}


def _nouns(thing: Thing) -> list[Noun]:
    return [Noun(thing.kind), *([Noun(thing.kind, thing.colour)] if thing.colour else [])]


def _name(noun: Noun, language: str, plural: bool = False) -> str:
    kind = SCENE_KINDS[noun.kind]
    if language == "zh":
        return (f"{COLOURS[noun.colour]}色的" if noun.colour else "") + kind.chinese
    name = kind.plural if plural else kind.english
    return f"{noun.colour} {name}" if noun.colour else name


@cache
def _named(language: str, plural: bool) -> dict[str, Noun]:
    """Every noun by its name."""
    nouns = [Noun(kind) for kind in SCENE_KINDS] + [
        Noun(kind, colour) for kind in SCENE_KINDS for colour, _ in SCENE_KINDS[kind].pictures if colour
    ]
    return {_name(noun, language, plural): noun for noun in nouns}


def _read(sentence: str, language: str) -> Claim | None:
    return _read_english(sentence) if language == "en" else _read_chinese(sentence)


def _read_english(sentence: str) -> Claim | None:
    single, several = _named("en", False), _named("en", True)
    if sentence.startswith("The sign says "):
        return _text(sentence[14:])
    if sentence.startswith(("There is ", "There are ")):
        _, verb, said, *name = sentence.split(" ")
        number = NUMBERS["en"].index(said) if said in NUMBERS["en"] else None
        noun = (single if number == 1 else several).get(" ".join(name))
        fits = number is not None and noun is not None and verb == ("is" if number == 1 else "are")
        return Number(noun, number) if fits else None
    if not sentence.startswith("The ") or " is " not in sentence:
        return None
    one, rest = sentence[4:].split(" is ", 1)
    noun = single.get(one)
    if noun is None:
        return None
    if rest in COLOURS:
        return Colour(noun.kind, rest) if noun.colour is None else None
    for said, make in [
        *((where, lambda other, where=where: Position(noun, where, other)) for where in POSITIONS),
        ("larger than", lambda other: Larger(noun, other)),
    ]:
        if rest.startswith(f"{said} the "):
            other = single.get(rest[len(said) + 5 :])
            return None if other is None else make(other)
    return None


def _read_chinese(sentence: str) -> Claim | None:
    names = _named("zh", False)
    if sentence.startswith("牌子上写着"):
        return _text(sentence[5:])
    if sentence.startswith("没有"):
        noun = names.get(sentence[2:])
        return None if noun is None else Number(noun, 0)
    if sentence.startswith("有") and sentence[1:2] in NUMBERS["zh"][1:]:
        noun = names.get(sentence[3:])
        fits = noun is not None and sentence[2] == SCENE_KINDS[noun.kind].measure
        return Number(noun, NUMBERS["zh"].index(sentence[1])) if fits else None
    if "是" in sentence and sentence.endswith("色的"):
        name, colour = sentence[:-2].split("是", 1)
        noun = names.get(name)
        colours = {said: colour for colour, said in COLOURS.items()}
        fits = noun is not None and noun.colour is None and colour in colours
        return Colour(noun.kind, colours[colour]) if fits else None
    if "比" in sentence and sentence.endswith("大"):
        one, two = (names.get(name) for name in sentence[:-1].split("比", 1))
        return Larger(one, two) if one and two else None
    for where, said in POSITIONS.items():
        if "在" in sentence and sentence.endswith(f"的{said}"):
            one, two = (names.get(name) for name in sentence[: -len(said) - 1].split("在", 1))
            return Position(one, where, two) if one and two else None
    return None


def _text(letters: str) -> Text | None:
    return Text(letters) if letters and letters.isascii() and letters.isalnum() else None


def _require_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; expected one of {', '.join(LANGUAGES)}.")
