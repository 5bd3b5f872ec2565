"""One grammar writes, reads and checks: nothing is lost either way, and nothing false is held for true."""

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_lite.data.scene_language import (
    NUMBERS,
    POSITIONS,
    Colour,
    Larger,
    Noun,
    Number,
    Position,
    Text,
    ask_whether,
    caption,
    claims_of,
    false_claim,
    is_true,
    questions,
    read_caption,
    read_claim,
    read_question,
    write_claim,
)
from minicpm_lite.data.scenes import COLOURS, SCENE_KINDS, Scene, Scenes, Thing

SCENES = Scenes(seed=3)
NOUNS = [Noun(kind) for kind in SCENE_KINDS] + [
    Noun(kind, colour) for kind in SCENE_KINDS for colour, _ in SCENE_KINDS[kind].pictures if colour
]
nouns = st.sampled_from(NOUNS)
claims = st.one_of(
    st.builds(Number, nouns, st.integers(0, 9)),
    st.builds(Colour, st.sampled_from([*SCENE_KINDS]), st.sampled_from([*COLOURS])),
    st.builds(Position, nouns, st.sampled_from([*POSITIONS]), nouns),
    st.builds(Larger, nouns, nouns),
    st.builds(Text, st.text("ABCXYZ0189", min_size=1, max_size=6)),
)
languages = st.sampled_from(["en", "zh"])


@settings(max_examples=400)
@given(claims, languages)
def test_what_is_written_is_read(claim, language):
    assert read_claim(write_claim(claim, language)) == claim
    assert read_question(ask_whether(claim, language)) == claim


def test_every_number_of_every_noun_and_every_colour():
    written = Counter()
    for language in ("en", "zh"):
        for noun, number in product(NOUNS, range(10)):
            sentence = write_claim(Number(noun, number), language)
            assert read_claim(sentence) == Number(noun, number)
            written[sentence] += 1
        for kind, colour in product(SCENE_KINDS, COLOURS):
            sentence = write_claim(Colour(kind, colour), language)
            assert read_claim(sentence) == Colour(kind, colour)
            written[sentence] += 1
    assert max(written.values()) == 1  # no sentence says two things


@settings(max_examples=300)
@given(claims, languages, st.data())
def test_a_word_too_many_or_another_one_is_another_claim_or_none(claim, language, data):
    """What is read is written again as it was: so nothing is overlooked."""
    sentence = write_claim(claim, language)
    letters = list(sentence)
    place = data.draw(st.integers(0, len(letters) - 1))
    what = data.draw(st.sampled_from(["cut", "double", "swap", "strange"]))
    if what == "cut":
        del letters[place]
    elif what == "double":
        letters.insert(place, letters[place])
    elif what == "strange":
        letters[place] = "ß"
    else:
        letters[place - 1], letters[place] = letters[place], letters[place - 1]
    spoilt = "".join(letters)
    try:
        found = read_claim(spoilt)
    except ValueError as refused:
        assert "is no claim of this grammar" in str(refused)
    else:
        assert write_claim(found, language) == spoilt


@pytest.mark.parametrize(
    "sentence",
    [
        "", ".", "。", "There is two dogs.", "There are one dog.", "There are two dog.", "There is one red dog.",
        "There are ten dogs.", "The dog is.", "The dog is red apple.", "The red apple is red.", "The dogs are red.",
        "The dog is left of cat.", "The dog is larger than the cat", "The sign says .", "The sign says A B.",
        "the dog is red.", "有2只狗。", "有两个狗。", "有两狗。", "没有。", "狗是红的。", "狗在猫左边。", "狗比猫。", "牌子上写着。",
        "有两只狗.", "There are two dogs。",
    ],
)  # fmt: skip
def test_what_is_no_claim_is_refused(sentence):
    with pytest.raises(ValueError, match="is no claim of this grammar"):
        read_claim(sentence)


@pytest.mark.parametrize(
    "question",
    ["Is it?", "Is the dog?", "Are there dogs?", "Does the sign say?", "狗吗？", "What?", "Is the dog red"],
)
def test_what_is_no_question_is_refused(question):
    with pytest.raises(ValueError, match="is no question of this grammar"):
        read_question(question)


def things(*placed) -> Scene:
    return Scene(tuple(Thing(*each) for each in placed), "K7", (100, 100, 60, 30))


SCENE = things(
    ("dog", None, 0, 0, 48),
    ("cat", None, 60, 50, 24),
    ("apple", "red", 0, 60, 24),
    ("apple", "green", 120, 0, 24),
)


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("There is one dog.", True), ("There are two dogs.", False), ("There are no owls.", True),
        ("There are two apples.", True), ("There is one red apple.", True), ("There is one apple.", False),
        ("There are no apples.", False), ("The dog is left of the cat.", True), ("The cat is left of the dog.", False),
        ("The dog is above the cat.", True), ("The cat is below the dog.", True), ("The cat is right of the dog.", True),
        ("The red apple is left of the green apple.", True), ("The red apple is below the dog.", True),
        ("The red apple is left of the dog.", False),  # it stands under it
        ("The apple is left of the cat.", False),  # which?
        ("The owl is left of the cat.", False),  # there is none
        ("The dog is larger than the cat.", True), ("The cat is larger than the red apple.", False),
        ("The cat is larger than the dog.", False), ("The sign says K7.", True), ("The sign says K8.", False),
        ("狗在猫的左边。", True), ("有两个苹果。", True), ("没有狗。", False), ("牌子上写着K7。", True),
    ],
)  # fmt: skip
def test_truth_by_hand(sentence, wanted):
    assert is_true(read_claim(sentence), SCENE) is wanted


def test_a_colour_is_that_of_the_only_one():
    one = things(("heart", "blue", 0, 0, 24))
    assert is_true(Colour("heart", "blue"), one) and not is_true(Colour("heart", "red"), one)
    assert not is_true(Colour("apple", "red"), SCENE)  # there are two


def naive_claims(scene: Scene) -> set:
    """All claims that there are about the things of a scene, tried one by one."""
    here = [noun for noun in NOUNS if any(noun.matches(thing) for thing in scene.things)]
    all_claims = [Number(noun, number) for noun in here for number in range(1, 10)]
    all_claims += [Colour(kind, colour) for kind in SCENE_KINDS for colour in COLOURS]
    all_claims += [Position(a, where, b) for a in here for b in here for where in POSITIONS]
    all_claims += [Larger(a, b) for a in here for b in here]
    all_claims += [Text(scene.text)] if scene.text else []
    return {claim for claim in all_claims if is_true(claim, scene)}


def test_all_that_is_true_is_found():
    for index in range(60):
        scene = SCENES[index]
        found = claims_of(scene)
        assert set(found) == naive_claims(scene)


def test_false_claims_are_false_and_of_every_kind():
    luck, kinds = random.Random(0), Counter()
    for index in range(300):
        claim = false_claim(SCENES[index], luck)
        assert not is_true(claim, SCENES[index])
        kinds[type(claim)] += 1
    assert set(kinds) == {Number, Colour, Position, Larger, Text}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_can_be_taken_apart_and_are_true(language):
    luck = random.Random(1)
    for index in range(200):
        scene = SCENES[index]
        said = read_caption(caption(scene, luck, language))
        assert 1 <= len(said) <= 6 and len(set(said)) == len(said)
        assert all(is_true(claim, scene) for claim in said)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_are_right(language):
    luck = random.Random(2)
    yes, no = ("yes", "no") if language == "en" else ("对", "不对")
    answers = Counter()
    for index in range(200):
        scene = SCENES[index]
        for question, answer in questions(scene, luck, language):
            if answer in (yes, no):
                assert is_true(read_question(question), scene) is (answer == yes)
                answers[answer] += 1
            elif "sign" in question or "牌子" in question:
                assert answer == scene.text
            elif question.startswith("How many") or "有几" in question:
                words = NUMBERS[language]
                number = words.index(answer if language == "en" else answer[0])
                verb = "is" if number == 1 else "are"
                if language == "en":
                    plural = question.removeprefix("How many ").removesuffix(" are there?")
                    noun = next(n for n in NOUNS if write_claim(Number(n, 2)) == f"There are two {plural}.")
                    assert write_claim(Number(noun, number)).startswith(f"There {verb} {answer}")
                else:
                    noun = read_claim(f"有两{question[2:-1]}。").noun
                assert is_true(Number(noun, number), scene)
            else:
                said = {word: colour for colour, word in COLOURS.items()}
                colour = answer if language == "en" else said[answer[:-1]]
                name = (
                    question.removeprefix("What colour is the ").removesuffix("?")
                    if language == "en"
                    else question.removesuffix("是什么颜色的？")
                )
                kind = next(k for k in SCENE_KINDS.values() if name in (k.english, k.chinese))
                assert is_true(Colour(kind.english, colour), scene)
    assert answers[yes] == answers[no] > 100


@pytest.mark.parametrize(
    "call", [lambda: write_claim(Text("A"), "de"), lambda: questions(SCENE, random.Random(0), "fr")]
)
def test_other_languages_are_refused(call):
    with pytest.raises(ValueError, match="expected one of en, zh"):
        call()
