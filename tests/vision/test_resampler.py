"""The resampler: counts, the attention of PyTorch, groups of frames, filling; and wrong ones told apart."""

import math

import pytest
import torch
from torch import nn

from minicpm_lite.vision.resampler import Resampler, ResamplerConfig, place_waves, time_waves

SMALL = ResamplerConfig(hidden_size=32, queries=4, vision_size=20, head_dim=8)


def make_resampler(config: ResamplerConfig = SMALL) -> Resampler:
    torch.manual_seed(0)
    model = Resampler(config).eval()
    for parameter in model.parameters():  # far from where they begin, so that each matters
        nn.init.normal_(parameter, std=0.4)
    return model


def sines(at: float, width: int) -> list[float]:
    """Sines, then cosines, one by one."""
    angles = [at / 10000 ** (k / (width // 2)) for k in range(width // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def place_of(row: int, column: int, width: int) -> torch.Tensor:
    return torch.tensor(sines(column, width // 2) + sines(row, width // 2))


def reference(model: Resampler, features, grids, ticks, wrong: str = "") -> torch.Tensor:
    """One group after the other, in float64, with PyTorch's attention and loops over patches.

    ``wrong`` names a mistake that somebody might make.
    """
    config = model.config
    width, heads = config.hidden_size, config.hidden_size // config.head_dim
    double = {name: value.double() for name, value in model.state_dict().items()}
    attention = nn.MultiheadAttention(width, heads, batch_first=True).double()
    attention.load_state_dict(
        {name.removeprefix("attn."): value for name, value in double.items() if name.startswith("attn.")}
    )

    def norm(x, name):
        return nn.functional.layer_norm(x, (width,), double[f"{name}.weight"], double[f"{name}.bias"], 1e-6)

    frame, found = 0, []
    for group in ticks:
        keys, values = [], []
        for tick in group:
            rows, columns = grids[frame]
            for patch in range(rows * columns):
                x = features[frame, patch].double()
                x = norm(x @ double["kv_proj.weight"].T if "kv_proj.weight" in double else x, "ln_kv")
                row, column = divmod(patch, columns)
                if wrong == "rows first":
                    row, column = column, row
                at = place_of(row, column, width).double()
                if tick >= 0 and wrong != "no time":
                    at = at + torch.tensor(sines(tick, width)).double()
                keys.append(x + at)
                values.append(x + at if wrong == "places on values" else x)
            frame += 1
        if wrong == "filled up":
            longest = features.shape[1]
            keys += [torch.zeros(width).double()] * (longest - len(keys))
            values += [torch.zeros(width).double()] * (longest - len(values))
        query = norm(double["query"], "ln_q")
        if config.places_on_queries:
            side = math.isqrt(config.queries)
            query = query + torch.stack(
                [place_of(row, column, width).double() for row in range(side) for column in range(side)]
            )
        out = attention(query[None], torch.stack(keys)[None], torch.stack(values)[None])[0]
        found.append(norm(out, "ln_post") @ double["proj"])
    return torch.cat(found)


def pictures(grids, size=20, seed=1):
    torch.manual_seed(seed)
    return torch.randn(len(grids), max(map(math.prod, grids)), size)


GRIDS = [(2, 3), (5, 1), (1, 1), (2, 3), (4, 4), (2, 3)]
TICKS = [[-1], [-1], [0], [2, 6, 9]]


@pytest.mark.parametrize(
    ("queries", "width", "total"),
    [(64, 4096, 88_907_776), (96, 4096, 89_038_848), (64, 3584, 68_619_264), (64, 2304, 29_366_784)],
)
def test_counts_of_the_releases(queries, width, total):
    with torch.device("meta"):
        model = Resampler(ResamplerConfig(width, queries))
    assert sum(parameter.numel() for parameter in model.parameters()) == total


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ResamplerConfig(hidden_size=16, queries=9, vision_size=20, head_dim=16, places_on_queries=True),
        ResamplerConfig(hidden_size=20, queries=1, vision_size=20, head_dim=4),  # as wide: nothing to project
    ],
)
def test_stills_and_groups_equal_the_reference(config):
    model, features = make_resampler(config), pictures(GRIDS)
    with torch.no_grad():
        ours = model(features, GRIDS, TICKS)
        assert ours.shape == (4, config.queries, config.hidden_size)
        torch.testing.assert_close(ours.double(), reference(model, features, GRIDS, TICKS), atol=2e-5, rtol=0)
        stills = [[-1]] * len(GRIDS)
        assert torch.equal(model(features, GRIDS), model(features, GRIDS, stills))
        torch.testing.assert_close(
            model(features, GRIDS).double(), reference(model, features, GRIDS, stills), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("mistake", ["rows first", "no time", "places on values", "filled up"])
def test_mistakes_are_told_apart(mistake):
    model, features = make_resampler(), pictures(GRIDS)
    right = reference(model, features, GRIDS, TICKS)
    wrong = reference(model, features, GRIDS, TICKS, wrong=mistake)
    assert (right - wrong).abs().max() > 0.05  # where right ones differ by 2e-5


def test_packed_is_alone():
    """Whatever shares the call, and whatever stands where a picture has no patch."""
    model, features = make_resampler(), pictures(GRIDS)
    loud = features.clone()
    for frame, grid in enumerate(GRIDS):
        loud[frame, math.prod(grid) :] = 1e4
    with torch.no_grad():
        together = model(loud, GRIDS, TICKS)
        frame = 0
        for number, group in enumerate(TICKS):
            here = slice(frame, frame + len(group))
            most = max(map(math.prod, GRIDS[here]))
            alone = model(features[here, :most], GRIDS[here], [group])[0]
            torch.testing.assert_close(together[number], alone, atol=1e-6, rtol=1e-5)
            frame += len(group)


def test_frames_are_seen_together_and_by_their_time():
    """The order of frames with their times says nothing; other times, or one frame less, say something."""
    model, grids = make_resampler(), [(2, 2), (2, 2)]
    features = pictures(grids)
    with torch.no_grad():
        both = model(features, grids, [[3, 7]])
        swapped = model(features.flip(0), grids, [[7, 3]])
        torch.testing.assert_close(both, swapped, atol=1e-6, rtol=1e-5)
        assert (both - model(features, grids, [[7, 3]])).abs().max() > 1e-3
        assert (both - model(features[:1], grids[:1], [[3]])).abs().max() > 1e-3


def test_one_time_for_all_keys_says_nothing():
    """It adds the same to every score of a query, which a softmax does not see."""
    model, grids = make_resampler(), [(2, 2), (3, 1)]
    features = pictures(grids)
    with torch.no_grad():
        still = model(features, grids)
        torch.testing.assert_close(model(features, grids, [[0], [700]]), still, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model(features, grids, [[5, 5]]), model(features, grids, [[90, 90]]), atol=1e-5, rtol=1e-5
        )


def test_places_beyond_the_table_of_the_release():
    table = place_waves(90, 75, 64).unflatten(0, (90, 75))
    for row, column in ((0, 0), (3, 5), (69, 69), (70, 74), (89, 0)):
        torch.testing.assert_close(table[row, column], place_of(row, column, 64), atol=2e-6, rtol=0)
    assert torch.equal(place_waves(3, 4, 64).unflatten(0, (3, 4)), table[:3, :4])


def test_times_of_an_hour_keep_their_digits():
    ticks = [-1, 0, 1, 36_000]
    found = time_waves(ticks, 64)
    assert torch.equal(found[0], torch.zeros(64))
    for tick, row in zip(ticks[1:], found[1:], strict=True):
        torch.testing.assert_close(row, torch.tensor(sines(tick, 64)), atol=1e-6, rtol=0)


def test_gradients_reach_every_weight():
    model, features = make_resampler(), pictures(GRIDS).requires_grad_()
    model(features, GRIDS, TICKS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    for frame, grid in enumerate(GRIDS):
        assert features.grad[frame, : math.prod(grid)].abs().sum() > 0
        assert features.grad[frame, math.prod(grid) :].abs().sum() == 0


def test_begins_as_the_release_does():
    torch.manual_seed(0)
    model = Resampler(ResamplerConfig(256, 64, 192, 64))
    assert 0.018 < float(model.query.detach().std()) < 0.022
    assert 0.018 < float(model.kv_proj.weight.detach().std()) < 0.022
    assert 0.058 < float(model.proj.detach().std()) < 0.067  # 256^-0.5
    assert not model.attn.in_proj_bias.any() and not model.attn.out_proj.bias.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(hidden_size=30), "hidden_size is 30; expected a multiple of head_dim, which is 8."),
        (
            dict(hidden_size=18, head_dim=9),
            "hidden_size is 18; expected a multiple of 4, for sine and cosine each way.",
        ),
        (dict(queries=0), "queries is 0; expected a whole number of at least 1."),
        (
            dict(queries=8, places_on_queries=True),
            "queries is 8; places on queries need a square number, such as 64.",
        ),
    ],
)
def test_shapes_that_cannot_be_are_refused(change, sentence):
    with pytest.raises(ValueError) as caught:
        ResamplerConfig(**{"hidden_size": 32, "queries": 4, "vision_size": 20, "head_dim": 8, **change})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("shape", "grids", "ticks", "sentence"),
    [
        ((2, 6, 19), [(2, 3)] * 2, None, "expected pictures, patches and 20 features"),
        ((2, 6, 20), [(2, 3)], None, "features of 2 pictures with at most 6 patches; the grids are"),
        ((2, 6, 20), [(2, 3), (7, 1)], None, "features of 2 pictures with at most 6 patches; the grids are"),
        ((2, 6, 20), [(2, 3)] * 2, [[0]], "groups of \\[1\\] frames, but there are 2 pictures"),
        ((2, 6, 20), [(2, 3)] * 2, [[0, 1], []], "no empty group"),
        ((2, 6, 20), [(2, 3)] * 2, [[-1, 1]], "a still image \\(-1\\) is a group by itself"),
        ((2, 6, 20), [(2, 3)] * 2, [[-2], [1]], "whole tenths of a second"),
        ((2, 6, 20), [(2, 3)] * 2, [[0.5], [1]], "whole tenths of a second"),
    ],
)
def test_calls_that_cannot_be_are_refused(shape, grids, ticks, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_resampler()(torch.zeros(shape), grids, ticks)
