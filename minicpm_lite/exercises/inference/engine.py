"""Checks and quiz of the chapter on the engine."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...lab.exercises import exercise
from ...lab.quiz import Quiz


def _numbers(found):
    """Whole numbers as a list, whatever they came in."""
    return [int(each) for each in (found.tolist() if isinstance(found, Tensor) else found)]


@exercise(
    "forecast",
    wrong=((10, 8), (14, 7), (10, 9), (7, 10), (12, 7), (9, 7), (11, 7), (10, 14), (10,), 10, ("10", "7")),
)
def forecast_steps(answer):
    """The bus waits for the longest of each pair; in the chairlift no row is ever empty."""
    assert isinstance(answer, tuple | list) and len(answer) == 2, (
        "Expected two numbers: the steps of the bus, and those of the chairlift."
    )
    assert not any(isinstance(each, str) for each in answer), "Expected numbers, not texts."
    bus, lift = answer
    assert int(bus) == bus == 10, (
        "The bus: the pairs are (5, 1), (1, 1) and (4, 2). How long does each pair take, and how many steps "
        "are that together?"
    )
    assert int(lift) == lift == 7, (
        "The chairlift: while the first row writes five tokens, the second serves three requests and begins "
        "the next. When is the last one done?"
    )


def _one_step(waiting, work, rows, order=1, early=True, leave=True, limit=True, begin=True, written=1):
    free = max(rows - len(work), 0) if limit else len(waiting)
    if not begin:
        free = min(free, 1)
    new, rest = waiting[:free], waiting[free:]
    if order < 0 and free:
        new, rest = waiting[-free:][::-1], waiting[:-free]
    old = [(name, left - written) for name, left in work]
    new = [(name, left - written) if early else (name, left) for name, left in new]
    work = [*old, *new]
    over = [name for name, left in work if left <= 0]
    return rest, [pair for pair in work if pair[1] > 0] if leave else work, over


def _thrown_out(waiting, work, rows):
    """Those at work beyond the rows go back, which nobody asked for."""
    return _one_step([*work[rows:], *waiting], work[:rows], rows)


def _cut_from_behind(waiting, work, rows):
    """A number of free rows below 0 counts from the end of those that wait."""
    free = rows - len(work)
    _, at_work, over = _one_step(waiting[:free], work, len(work) + len(waiting))
    return waiting[free:], at_work, over


def _two_begin(waiting, work, rows):
    """Who is over makes room in the same step, and the next begins without a token."""
    waiting, work, over = _one_step(waiting, work, rows)
    free = max(rows - len(work), 0)
    return waiting[free:], [*work, *waiting[:free]], over


_STEPS = (
    ([("C", 2), ("D", 4)], [("A", 3), ("B", 7)], 2, "Both rows are taken: nobody begins."),
    ([("C", 2), ("D", 4)], [("B", 5)], 2, "One row is free: C begins, and gets its first token."),
    ([("C", 1), ("D", 4), ("E", 2)], [], 2, "C begins and is done in the same step; D begins, E waits."),
    (
        [("C", 2)],
        [("A", 1), ("B", 1)],
        2,
        "A and B get their last tokens; their rows are free in the next step.",
    ),
    ([], [("B", 2)], 3, "Nobody waits."),
    ([("C", 1), ("D", 1)], [], 5, "There may be more rows than requests."),
    ([("D", 3)], [("A", 2), ("B", 1), ("C", 4)], 2, "More at work than rows: nobody begins, all go on."),
    ([("C", 2), ("D", 3)], [("A", 2), ("B", 4)], 1, "More at work than rows, and two wait: nobody begins."),
    ([("D", 3), ("E", 2), ("F", 1)], [("A", 1)], 4, "Three rows are free, and three wait."),
    ([], [], 2, "Nothing to do."),
)


@exercise(
    "one step",
    wrong=(
        lambda waiting, work, rows: _one_step(waiting, work, rows, order=-1),  # the last one first
        lambda waiting, work, rows: _one_step(waiting, work, rows, early=False),
        lambda waiting, work, rows: _one_step(waiting, work, rows, leave=False),
        lambda waiting, work, rows: _one_step(waiting, work, rows, limit=False),
        lambda waiting, work, rows: _one_step(waiting, work, rows, begin=False),
        lambda waiting, work, rows: _one_step(waiting, work, rows, written=2),
        lambda waiting, work, rows: _one_step(waiting, work, 2),
        lambda waiting, work, rows: _one_step([], work, rows),
        _cut_from_behind,
        lambda waiting, work, rows: (*_one_step(waiting, work, rows)[:2], []),
        _thrown_out,
        _two_begin,
    ),
)
def one_step(answer):
    """Begin, write, leave: a row is never empty while somebody waits, and nobody waits for others to end."""
    for waiting, work, rows, hint in _STEPS:
        got = answer(list(waiting), list(work), rows)
        assert isinstance(got, tuple | list) and len(got) == 3, (
            "Return three lists: who still waits, who is still at work, and the names of those that are over."
        )
        still, at_work, over = _one_step(list(waiting), list(work), rows)
        found = [[(name, int(left)) for name, left in pairs] for pairs in got[:2]]
        assert found[0] == still, (
            f"one_step({waiting}, {work}, {rows}): {still} still wait, and not {found[0]}. {hint}"
        )
        assert found[1] == at_work, (
            f"one_step({waiting}, {work}, {rows}): {at_work} are at work behind it, and not {found[1]}. "
            f"{hint}"
        )
        assert list(got[2]) == over, (
            f"one_step({waiting}, {work}, {rows}): {over} got their last token, and not {list(got[2])}. "
            f"{hint}"
        )


def _slots_of(pages, first, last, size, table=True, inside=True, end=0, whole=False):
    found = []
    for place in range(first, last + end):
        page = pages[min(place // size, len(pages) - 1)] if table else place // size
        found.append(page * size + (place % size if inside else 0))
    return (
        [page * size + place for page in pages for place in range(size)][: last - first] if whole else found
    )


_TABLES = (
    ([5, 0, 2], 0, 3, 4, "The first three tokens are in page 5, which begins at slot 20."),
    ([5, 0, 2], 3, 6, 4, "Token 3 is the last of page 5, token 4 the first of page 0."),
    ([5, 0, 2], 8, 12, 4, "Entry 8 // 4 = 2 of the table is page 2."),
    ([3, 1], 0, 4, 2, "The size is an argument; here a page has two tokens."),
    ([7], 0, 1, 16, "One token."),
    ([7, 4], 15, 17, 16, "The last of a page and the first of the next."),
    ([2, 6], 3, 3, 4, "From 3 up to but not including 3: no token at all."),
)


@exercise(
    "slots",
    wrong=(
        lambda pages, first, last, size: _slots_of(pages, first, last, size, table=False),  # one piece
        lambda pages, first, last, size: _slots_of(pages, first, last, size, inside=False),
        lambda pages, first, last, size: _slots_of(pages, first, last, size, end=1),
        lambda pages, first, last, size: _slots_of(pages, first, last, 4),
        lambda pages, first, last, size: _slots_of(pages, 0, last, size),
        lambda pages, first, last, size: _slots_of(pages, first, last, size, whole=True),
        lambda pages, first, last, size: [
            pages[place // size] + place % size for place in range(first, last)
        ],
        lambda pages, first, last, size: _slots_of(sorted(pages), first, last, size),
        lambda pages, first, last, size: _slots_of(pages, first, last, size)[::-1],
    ),
)
def slots_of(answer):
    """The page is looked up in the text's own list; the place within it is what is left."""
    for pages, first, last, size, hint in _TABLES:
        got, expected = _numbers(answer(list(pages), first, last, size)), _slots_of(pages, first, last, size)
        assert got == expected, (
            f"slots_of({pages}, {first}, {last}, {size}) should be {expected}, and not {got}. {hint}"
        )


def _begin(waiting, rows, pages, count=True, row=0, wait=True, last=0):
    begun = []
    for place, need in enumerate(waiting):
        if len(begun) >= rows + row or need > pages - last:
            if wait:
                break
            continue
        begun.append(place)
        if count:
            pages -= need
    return begun


_QUEUES = (
    (
        [2, 3, 1],
        3,
        4,
        "The first takes two pages, so two are left, the second does not fit, and the third waits.",
    ),
    ([2, 3, 1], 3, 9, "All fit."),
    ([1, 1, 1], 2, 9, "Two rows: two begin."),
    ([3, 1], 2, 2, "The first does not fit, and nobody overtakes it."),
    ([2, 2], 2, 4, "Two and two are four: both fit exactly."),
    ([2, 2, 1], 3, 4, "Behind the first two no page is left."),
    ([1, 1], 0, 9, "No row is free."),
    ([], 3, 5, "Nobody waits."),
    ([1, 4, 1, 1], 4, 5, "One and four are five; the others wait."),
    ([1], 1, 0, "No page is free."),
)


@exercise(
    "mended begin",
    wrong=(
        lambda waiting, rows, pages: _begin(
            waiting, rows, pages, count=False, row=1, wait=False
        ),  # as it was
        lambda waiting, rows, pages: _begin(waiting, rows, pages, count=False),
        lambda waiting, rows, pages: _begin(waiting, rows, pages, row=1),
        lambda waiting, rows, pages: _begin(waiting, rows, pages, wait=False),
        lambda waiting, rows, pages: _begin(waiting, rows, pages, last=1),
        lambda waiting, rows, pages: _begin(waiting, 99, pages),
        lambda waiting, rows, pages: _begin(waiting, rows, 99),
        lambda waiting, rows, pages: [waiting[place] for place in _begin(waiting, rows, pages)],
        lambda waiting, rows, pages: _begin(sorted(waiting), rows, pages),
        lambda waiting, rows, pages: [place + 1 for place in _begin(waiting, rows, pages)],
    ),
)
def mended_begin(answer):
    """Lent pages are counted, and the first that does not fit holds the door: nobody is overtaken."""
    for waiting, rows, pages, hint in _QUEUES:
        got, expected = _numbers(answer(list(waiting), rows, pages)), _begin(waiting, rows, pages)
        assert got == expected, (
            f"Needs {waiting}, {rows} rows, {pages} pages free: the places {expected} begin, and not {got}. "
            f"{hint}"
        )


def _shared(prompt, read, size, last=1, whole=True, chain=True, first=False, tokens=False):
    found = 0
    for text in read[:1] if first else read:
        for pages in range(1, (len(prompt) - last) // size + 1):
            start = 0 if chain else (pages - 1) * size
            end = pages * size
            same = list(text[start:end]) == list(prompt[start:end])
            if not same and not whole:
                same = end > len(text) > end - size and list(text[start:]) == list(prompt[start : len(text)])
            if same:
                found = max(found, pages)
            elif chain:
                break
    if tokens:
        found *= size
    return found


def _common(prompt, read, size):
    """As many pages as tokens in common would fill, the last page of either half full."""
    most = 0
    for text in read:
        same = 0
        while same < min(len(text), len(prompt)) and text[same] == prompt[same]:
            same += 1
        most = max(most, same)
    return -(-most // size)


def _anywhere(prompt, read, size):
    """Pages that stand in some text, wherever it may be."""
    known = {tuple(text[at : at + size]) for text in read for at in range(0, len(text) - size + 1, size)}
    pages = 0
    while (pages + 1) * size < len(prompt) and tuple(prompt[pages * size : (pages + 1) * size]) in known:
        pages += 1
    return pages


_KNOWN = (
    ([1, 4, 2, 0, 8, 9], [[1, 4, 2, 0, 3, 5]], 4, "One page is the same."),
    (
        [1, 4, 2, 0],
        [[1, 4, 2, 0, 3, 5]],
        4,
        "The last token of the prompt must be read, so its page is not shared.",
    ),
    ([1, 4, 2, 0, 8], [[1, 4, 2, 0]], 4, "The page is full, and the prompt's last token stands behind it."),
    ([1, 4, 2, 0, 8, 9], [[1, 4, 2]], 4, "The other's page is half full, and will be written."),
    ([1, 4, 2, 0, 8, 9], [], 4, "Nothing was read yet."),
    ([1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 9], [1, 2, 3, 4, 5, 6]], 2, "The second text has three pages of it."),
    ([9, 9, 3, 4, 5], [[1, 2, 3, 4]], 2, "3 4 stands behind another beginning: another page."),
    ([3, 4, 3, 4, 5], [[1, 2, 3, 4], [3, 4]], 2, "Only the first page: 3 4 behind 3 4 was read by nobody."),
    (
        [1, 2, 3, 4, 5],
        [[1, 2, 9, 9], [8, 8, 3, 4]],
        2,
        "One text has the first page, another the second; not both.",
    ),
    (
        [1, 1, 2, 2, 3, 3, 9],
        [[1, 1, 2, 2], [5, 5, 2, 2, 3, 3]],
        2,
        "3 3 was read behind 2 2, but behind another 2 2: the whole beginning counts, not one page of it.",
    ),
    ([7], [[7, 7, 7]], 1, "The only token is the last one."),
    ([7, 7, 7], [[7, 7, 7, 7]], 1, "Pages of one token: all but the last."),
    (
        [1, 2, 3, 4, 5, 6, 7, 8],
        [[1, 2, 3, 4, 5, 6, 7, 8]],
        4,
        "All is known, and the last page is read again.",
    ),
)


def _one_before(prompt, read, size):
    """A page is known by its tokens and those of the page before it, and no more."""

    def pages(text):
        return [tuple(text[at : at + size]) for at in range(0, len(text) - size + 1, size)]

    known = {pair for text in read for pair in pairwise([None, *pages(text)])}
    count = 0
    for pair in pairwise([None, *pages(prompt[:-1])]):
        if pair not in known:
            break
        count += 1
    return count


@exercise(
    "shared pages",
    wrong=(
        lambda prompt, read, size: _shared(prompt, read, size, last=0),  # nothing is left to read
        lambda prompt, read, size: _shared(prompt, read, size, whole=False),
        lambda prompt, read, size: _shared(prompt, read, size, chain=False),
        lambda prompt, read, size: _shared(prompt, read, size, first=True),
        lambda prompt, read, size: _shared(prompt, read, size, tokens=True),
        lambda prompt, read, size: _shared(prompt, read, 4),
        lambda prompt, read, size: (len(prompt) - 1) // size if read else 0,
        lambda prompt, read, size: min(1, _shared(prompt, read, size)),
        _one_before,
        _common,
        _anywhere,
    ),
)
def shared_pages(answer):
    """Whole pages of the same beginning, and never the token that must be read to be answered."""
    for prompt, read, size, hint in _KNOWN:
        got, expected = answer(list(prompt), [list(text) for text in read], size), _shared(prompt, read, size)
        assert float(got) == int(got), f"Expected a whole number of pages, and not {got}."
        assert int(got) == expected, (
            f"shared_pages({prompt}, {read}, {size}) should be {expected}, and not {int(got)}. {hint}"
        )


def _sums(rows, parts=None, size=64):
    """Each row in parts of so many numbers, or in so many parts; the parts are added up in their order."""
    sums = []
    for row in rows:
        step = size if parts is None else max(1, -(-len(row) // parts))
        total = torch.zeros(())
        for at in range(0, len(row), step):
            total = total + row[at : at + step].sum()
        sums.append(total)
    return sums


def _filled(rows):
    """All as long as the longest, with zeros, and in two parts of that length."""
    longest = max(map(len, rows))
    filled = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    return [*filled[:, : longest // 2].sum(1) + filled[:, longest // 2 :].sum(1)]


@exercise(
    "order of adding",
    wrong=(
        lambda rows: _sums(rows, parts=max(1, 8 // len(rows))),  # as it was given
        lambda rows: _sums(rows, parts=len(rows)),
        lambda rows: _sums(rows, size=8 * len(rows)),
        lambda rows: _sums(rows, size=64 if len(rows) < 16 else 128),
        _filled,
        lambda rows: [total.round(decimals=1) for total in _sums(rows)],  # hides it
        lambda rows: _sums(rows)[:1],
        lambda rows: _sums([row[: len(row) // 64 * 64] for row in rows]),  # what is over is lost
        lambda rows: [total.new_zeros(()) for total in _sums(rows)],
        lambda rows: _sums([*reversed(rows)]),
    ),
)
def mended_sums(answer):
    """The order of adding depends on the row's own length alone, so its last bit does, too."""
    luck = torch.Generator().manual_seed(0)
    for lengths in (
        (300, 200),
        (100, 900, 500, 64),
        (700,) * 8,
        (1, 999, 2),
        (513, 4, 40, 77, 640, 300, 8, 9, 10),
    ):
        rows = [torch.randn(length, generator=luck) for length in lengths]
        got = list(answer([row.clone() for row in rows]))
        assert len(got) == len(rows), f"{len(rows)} rows have {len(rows)} sums; yours are {len(got)}."
        for row, found in zip(rows, got, strict=True):
            right, found = row.double().sum().item(), float(found)
            assert abs(found - right) < 1e-3, (
                f"A row of {len(row)} numbers has the sum {right:.5f}, and yours is {found:.5f}. Is every "
                "number added once, and none rounded away?"
            )
        for number, row in enumerate(rows):
            for company in ([row], [row, rows[0], rows[-1]], [row] * 8, [row] * 17, [row] * 33):
                alone = list(answer([each.clone() for each in company]))[0]
                assert float(alone) == float(got[number]), (
                    f"A row of {len(row)} numbers has the sum {float(got[number]):.9g} among {len(rows)} "
                    f"rows and {float(alone):.9g} among {len(company)}. What in your order of adding depends "
                    "on the other rows?"
                )


def _levelled(wanted):
    least, more = divmod(sum(wanted), len(wanted))
    return [least + (place < more) for place in range(len(wanted))]


@exercise(
    "levelled",
    wrong=(
        lambda wanted: wanted,  # nothing is done
        lambda wanted: sorted(wanted, reverse=True),
        lambda wanted: [max(wanted)] * len(wanted),  # other work
        lambda wanted: [sum(wanted) // len(wanted)] * len(wanted),
        lambda wanted: [round(sum(wanted) / len(wanted))] * len(wanted),
        lambda wanted: [sum(wanted) / len(wanted)] * len(wanted),
        lambda wanted: _levelled(wanted)[::-1],  # the larger ones last
        lambda wanted: [
            *[sum(wanted) // len(wanted)] * (len(wanted) - 1),
            sum(wanted) - sum(wanted) // len(wanted) * (len(wanted) - 1),
        ],  # the last one has all the rest
        lambda wanted: [sorted(wanted)[len(wanted) // 2]] * len(wanted),
    ),
)
def levelled(answer):
    """The same work in as many requests, and no difference of lengths: what is gained now is not theirs."""
    for wanted in ([3, 7, 2, 4], [8, 1, 1], [5], [2, 2, 2], [9, 1, 1, 1, 1], [1, 2], [30, 64, 8, 17, 22, 40]):
        got, expected = list(answer(list(wanted))), _levelled(wanted)
        assert len(got) == len(wanted), f"{len(wanted)} requests are needed, as before, and not {len(got)}."
        assert all(float(each) == int(each) for each in got), f"Tokens are whole numbers; {got} are not."
        got = _numbers(got)
        assert sum(got) == sum(wanted), (
            f"{wanted} are {sum(wanted)} tokens and yours are {sum(got)}: then the work differs, too, and "
            "the control proves nothing."
        )
        assert got == expected, (
            f"From {wanted} expected {expected}: as equal as whole numbers can be, the larger ones first. "
            f"Yours is {got}."
        )


def _rows_within(promise, weights, text, rate, own=True, nearest=False, least=0, more=0):
    left = promise * rate - (weights if own else 0)
    found = left / text
    return max(round(found) if nearest else int(found // 1), least) + more


_PROMISES = (
    (0.2, 15.8e9, 0.134e9, 100e9, "20 GB can be read, 4.2 of them for texts."),
    (0.1, 15.8e9, 0.134e9, 100e9, "Not even the weights can be read in time."),
    (0.158, 15.8e9, 1e9, 100e9, "The weights take all of the time."),
    (1.0, 10.0, 4.0, 29.0, "19 bytes are left, 4.75 texts: four."),
    (1.0, 10.0, 4.0, 30.0, "20 bytes are left: exactly five."),
    (2.0, 10.0, 4.0, 16.0, "32 bytes in two seconds, 22 of them for texts: five."),
)


@exercise(
    "rows within",
    wrong=(
        lambda promise, weights, text, rate: _rows_within(promise, weights, text, rate, own=False),
        lambda promise, weights, text, rate: _rows_within(promise, weights, text, rate, nearest=True),
        lambda promise, weights, text, rate: _rows_within(promise, weights, text, rate, least=1),
        lambda promise, weights, text, rate: _rows_within(promise, weights, text, rate, least=-99),
        lambda promise, weights, text, rate: _rows_within(promise, weights, text, rate, more=1),
        lambda promise, weights, text, rate: _rows_within(1.0, weights, text, rate),
        lambda promise, weights, text, rate: max(
            int(promise * rate / (weights + text)), 0
        ),  # weights for each
        lambda promise, weights, text, rate: max((promise * rate - weights) / text, 0),
    ),
)
def rows_within(answer):
    """The weights are read whoever is there; the caches share what is left of the time."""
    for promise, weights, text, rate, hint in _PROMISES:
        got, expected = answer(promise, weights, text, rate), _rows_within(promise, weights, text, rate)
        assert float(got) == int(got), f"Expected a whole number of texts, and not {got}."
        assert int(got) == expected, (
            f"Promise {promise:g} s, weights {weights:g}, text {text:g} bytes, {rate:g} bytes a second: "
            f"{expected} texts at most, and not {int(got)}. {hint}"
        )


quiz = Quiz(
    [
        (
            "Eight texts that have nothing in common are written together. What do they share in a step?",
            [
                "the reading of the weights",
                "the reading of the caches",
                "both the weights and the caches",
            ],
            0,
            "Each text has a cache of its own, which is read for its row alone. Only the weights serve all.",
        ),
        (
            "Counted in steps, continuous batching brings most where",
            [
                "all requests want equally many tokens",
                "requests want very different numbers of tokens",
                "there is one request",
            ],
            1,
            "What it saves are the rows that are empty until the longest of a batch is done.",
        ),
        (
            "Two prompts have their first ten tokens in common; a page has four. They can share",
            ["two pages", "two pages and a half", "three pages"],
            0,
            "Only whole pages: in the third both would write their next tokens into the same slots.",
        ),
        (
            "A page holds the tokens 3 4 5 6. Another prompt has these four, too, behind another first page.",
            [
                "It can name the same page, since its tokens are the same.",
                "It needs a page of its own, because keys depend on all that stands before.",
                "It can name it if it copies the page first.",
            ],
            1,
            "The same tokens behind another beginning have other keys and values.",
        ),
        (
            "Another library's engine now and then writes your text with another word when seven others are "
            "written beside it. A likely reason is that",
            [
                "it must have mixed up rows, since sums of the same numbers are the same",
                "its kernels add up in another order for eight rows, and two words were nearly tied",
                "greedy decoding draws by dice when a machine is busy",
            ],
            1,
            "A kernel whose order depends on the token alone gives the same bits, and words, in any company.",
        ),
        (
            "At a length where the cache is a hundredth of what is read, sparse attention alone is worth",
            [
                "as much as at any other length",
                "next to nothing",
                "a factor of twenty, as it reads a twentieth",
            ],
            1,
            "It shrinks one term of a sum. If the term is small, nothing is gained, however much it shrinks.",
        ),
    ]
)
