"""EAGLE-3: a draft of one block, which reads what the target has made of the text.

    stream[t] = the target's residual stream at token t after 2, L / 2 and L - 3 blocks, one behind the other
    h[t]      = W_fuse stream[t]                                         what the target knows there
    x[t]      = [norm(embedding of token t + 1), norm(h[t])]             2 d wide: and which token came next
    g[t]      = h[t] + attention(x)[t];   g[t] = g[t] + feed_forward(norm(g[t]))
    guess of token t + 2 = W_out norm(g[t])                              over the most frequent tokens alone
    h[t + 1]  = g[t]                              behind the text, where there is no stream of the target yet

    EagleHead(config, vocabulary)       the block; small beside its target
    EagleDraft(head, target, shape)     guesses with it
    eagle(target)                       what it is trained with, as an objective of the `Trainer`
    agreement_by_step(head, target, ids)    how often it names the target's best token, guess by guess
    unrolled(head, streams, embedded)   its states in such a chain of guesses at all places of a text at once
    share_output(head, target)          the target's own output layer, cut to the head's tokens and frozen
    save_eagle(file, head, ranking)     such a head without that layer, which its target has
    load_eagle(file, target, kept)      the same head, guessing so many of the most frequent tokens

A small decoder has to find out anew what a text is about; the streams say it, and one block suffices.

The training-time test: a head that was trained on streams alone fails at its second guess, which it makes
from its own g. So it is unrolled in training as it will be used, seven steps, each of which reads what the
one before has made. In step k the query at t sees the keys of step 0 up to t, which stand for the text, and
of the steps since then its own.

Source: Li et al. 2025, "EAGLE-3", arXiv 2503.01840, and its released code.

Choices, and the traps behind them:

- The law of the target is learned, not the token of the text, and no stream is to be reproduced (EAGLE-1 and
  2 did that, and it held them back).
- The law is that over the draft's vocabulary, divided by its sum. Where the target's best token is outside,
  nothing can be guessed, and nothing is learned.
- What a step weighs falls by 0.8: later guesses matter where the earlier ones were right.
- The target and its embeddings stay as they are. The head holds no embeddings.
- A head of EAGLE-3 has an output layer of its own. With the target's (`share_output`), as EAGLE-2 has it,
  there is half as much to train and to keep, and how many tokens are guessed can be chosen afterwards, as
  FR-Spec does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import ModelConfig, require_positive_integer, require_positive_number
from ..language.context import Context, causal_mask
from ..language.decoder import Decoder
from ..language.layers import Attention, FeedForward, RMSNorm
from ..language.sampling import Sampling
from ..language.scoring import evaluating, predicted, readable
from ..training.checkpoint import load_checkpoint, save_checkpoint
from ..training.objective import Objective
from ..training.state import fingerprint
from .drafts import Reading, require_ids
from .guess_trees import Shape
from .speculative import Drafting

__all__ = ["EagleDraft", "EagleHead", "agreement_by_step", "eagle", "levels", "load_eagle", "save_eagle",
           "share_output", "unrolled"]  # fmt: skip

STEPS, DECAY = 7, 0.8  # of the training-time test; what a step weighs beside the one before
_FORMAT, _OUTPUT, _RANKING = "minicpm_lite.eagle", "lm_head.weight", "ranking"  # of a file


def levels(blocks: int) -> tuple[int, int, int]:
    """After how many of a target's blocks its stream is read: early, in the middle, late.

    Raises:
        ValueError: there are fewer than 4.

    >>> levels(30)
    (2, 15, 27)
    """
    if blocks < 4:
        raise ValueError(f"The target has {blocks} blocks; EAGLE-3 reads three levels of 4 or more.")
    return (2, blocks // 2, blocks - 3)


class EagleHead(nn.Module):
    """One block behind a target's streams, and an output layer for some of its tokens.

    Args:
        config: of the target, whose width, heads and positions are the head's too.
        vocabulary: the ids that it guesses, as the first that `rank_by_frequency` names; released heads store
            how far they are from 0, 1, 2, … instead.

    Attributes:
        shares_output: its output layer is a part of the target's, see `share_output`.

    Raises:
        ValueError: no id, one that the target lacks, or one that comes twice; latent attention or experts.
    """

    def __init__(self, config: ModelConfig, vocabulary: Int[Tensor, " kept"]) -> None:
        super().__init__()
        require_ids(vocabulary, config.vocab_size)
        if config.latent_attention or config.mixture:
            raise ValueError("The head is a plain block; the target has latent attention or experts.")
        self.config, width, eps = config, config.hidden_size, config.rms_norm_eps
        self.fuse = nn.Linear(len(levels(config.num_hidden_layers)) * width, width, bias=False)
        self.token_norm, self.hidden_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.self_attn = Attention(config, 0, input_size=2 * width)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = FeedForward(config)
        self.norm = RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, len(vocabulary), bias=False)
        self.register_buffer("vocabulary", vocabulary.long())
        self.shares_output = False

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens d"],
        embedded: Float[Tensor, "batch tokens d"],
        context: Context | None = None,
    ) -> Float[Tensor, "batch tokens d"]:
        """What the block makes of what is known at each token, and of the token that came next.

        Args:
            hidden: fused streams, or what the head itself made of the guess before.
            embedded: the embeddings of the tokens that come next.
            context: what the tokens may look at; left out, they are a text of their own.
        """
        context = Context() if context is None else context
        context.belong(self)
        rotary = context.angles(self.config, context.begin(hidden))
        x = torch.cat([self.token_norm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(x, rotary, context)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        context.end()
        return hidden

    def logits(self, hidden: Float[Tensor, "batch tokens d"]) -> Float[Tensor, "batch tokens kept"]:
        """What this says of the token after the next, over the vocabulary of the head."""
        return self.lm_head(self.norm(hidden)).float()


@dataclass(frozen=True)
class EagleDraft:
    """Guesses with a head that was trained for the target.

    Attributes:
        head: the head.
        shape: what its guesses look like.
    """

    head: EagleHead
    shape: Shape

    def begin(
        self, target: Decoder, room: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Drafting:
        """Be ready for new texts; see `Draft`.

        Raises:
            ValueError: the head was made for a target of another shape.
        """
        mine, its = self.head.config, target.config
        if (mine.hidden_size, mine.num_hidden_layers, mine.vocab_size) != (
            its.hidden_size,
            its.num_hidden_layers,
            its.vocab_size,
        ):
            raise ValueError(
                f"The head is for {mine.num_hidden_layers} blocks of width {mine.hidden_size} and "
                f"{mine.vocab_size} tokens, and the target has {its.num_hidden_layers} of width "
                f"{its.hidden_size} and {its.vocab_size}. Give the head that was trained for it."
            )
        return _EagleReading(self, target, room, sampling, generator)


class _EagleReading(Reading):
    """What `EagleDraft` knows of the rows: streams that it was shown and has not read, and its cache."""

    def __init__(
        self,
        draft: EagleDraft,
        target: Decoder,
        room: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        head = draft.head
        super().__init__(head, head.config, draft.shape, head.vocabulary, room, sampling, generator)
        self.target, self.after = target, levels(head.config.num_hidden_layers)
        self.unread: list[Float[Tensor, "_unread features"]] = []  # of each row

    def see(self, streams: Sequence[Float[Tensor, "_read features"]]) -> None:
        """Keep them until the tokens behind them are known; see `StreamDrafting`."""
        self.unread = [
            torch.cat(each) for each in zip(self.unread or [s[:0] for s in streams], streams, strict=True)
        ]

    def inputs_of_texts(self, new: Sequence[Sequence[int]]) -> list[Float[Tensor, "_new width"]]:
        streams, self.unread = self.unread, []
        inputs = []
        for row, stream in zip(new, streams, strict=True):
            ids = torch.tensor([row[len(row) - len(stream) :]], device=self.device)  # each behind its stream
            hidden = self.model.fuse(stream.to(self.model.norm.weight))
            inputs.append(torch.cat([self.target.embed(ids)[0].to(hidden), hidden], dim=-1))
        return inputs

    def inputs_of_guesses(
        self, tokens: Int[Tensor, "rows guesses"], before: Float[Tensor, "rows guesses d"]
    ) -> Float[Tensor, "rows guesses width"]:
        return torch.cat([self.target.embed(tokens).to(before), before], dim=-1)

    def states(
        self, inputs: Float[Tensor, "rows tokens width"], context: Context
    ) -> Float[Tensor, "rows tokens d"]:
        embedded, hidden = inputs.chunk(2, dim=-1)
        return self.model(hidden, embedded, context)

    def scores(self, states: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens kept"]:
        return self.model.logits(states)

    def select(self, rows: Sequence[int]) -> None:
        """These rows go on; see `Drafting`."""
        super().select(rows)
        self.unread = [self.unread[row] for row in rows] if self.unread else []


class _Unrolled(Context):
    """The training-time test: a call is a step, a text of guesses one further behind the text each time."""

    def __init__(self) -> None:
        self.step = 0
        self.kept: list[tuple[Tensor, ...]] = []

    def begin(self, x: Float[Tensor, "batch tokens d"]) -> Int[Tensor, " tokens"]:
        return super().begin(x) + self.step

    def keep(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        self.kept.append(new)
        return tuple(torch.cat(each, dim=2) for each in zip(*self.kept, strict=True))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Beside the text a token sees one key of each step, so the scores of all others are not made.
        batch, heads, tokens, width = query.shape
        query = query.unflatten(1, (key.shape[1], -1))  # (batch, kv_heads, group, tokens, head_dim)
        key, value = (each[:, :, None].unflatten(3, (-1, tokens)) for each in (key, value))  # by step
        text = query @ key[:, :, :, 0].mT
        text = text.masked_fill(~causal_mask(tokens, tokens, query.device), -torch.inf)
        own = (query[:, :, :, None] * key[:, :, :, 1:]).sum(-1).movedim(3, -1)  # (…, tokens, steps)
        shares = (torch.cat([text, own], dim=-1).float() / width**0.5).softmax(-1).to(value)
        found = shares[..., :tokens] @ value[:, :, :, 0]
        found = found + (shares[..., tokens:].movedim(-1, 3)[..., None] * value[:, :, :, 1:]).sum(3)
        return found.reshape(batch, heads, tokens, -1)

    def end(self) -> None:
        self.step += 1


@dataclass(frozen=True, eq=False)
class _Taught:
    """What a target makes of a window, for a head to learn.

    Attributes:
        hidden: its streams; the head fuses them.
        embedded: its embeddings.
        law: over the head's vocabulary, of the token behind each.
        named: whether its best token is one of these.
    """

    streams: Float[Tensor, "batch window features"]
    embedded: Float[Tensor, "batch window d"]
    law: Float[Tensor, "batch window kept"]
    named: Bool[Tensor, "batch window"]


@torch.no_grad()
def _taught(head: EagleHead, target: Decoder, ids: Int[Tensor, "batch window"]) -> _Taught:
    with evaluating(target):
        embedded = target.embed(ids)
        *streams, last = target.states(embedded, after=levels(target.config.num_hidden_layers))
        logits = target.logits(last).float()
    kept = logits[..., head.vocabulary]
    named = kept.amax(-1) == logits.amax(-1)
    mine = head.norm.weight.dtype  # in training it may be shorter than the target's
    return _Taught(torch.cat(streams, dim=-1).to(mine), embedded.to(mine), kept.softmax(-1), named)


def _guesses(
    head: EagleHead, taught: _Taught, steps: int
) -> list[
    tuple[
        Float[Tensor, "batch _places kept"],
        Float[Tensor, "batch _places kept"],
        Bool[Tensor, "batch _places"],
    ]
]:
    """The scores of each step, and what the target says there: its law, and whether its best token is named.

    Those of step k at place t are about the token t + 2 + k, so they stand beside the law behind t + 1 + k.
    """
    return [
        (head.logits(hidden), taught.law[:, 1 + step :], taught.named[:, 1 + step :])
        for step, hidden in enumerate(unrolled(head, taught.streams, taught.embedded, steps))
    ]


def unrolled(
    head: EagleHead,
    streams: Float[Tensor, "batch window features"],
    embedded: Float[Tensor, "batch window d"],
    steps: int = STEPS,
) -> Iterator[Float[Tensor, "batch _places d"]]:
    """What the head makes of each place of a text, guess after guess, each from what came of the one before.

    That of step k at place t is about the token t + 2 + k, if all before it are the text's. So step 0 has a
    place less than the text, and each further step one less.

    Args:
        head: its `logits` say what the states mean.
        streams: of the target, as its `levels` have them.
        embedded: the target's embeddings of the tokens.
        steps: guesses, one from the other.
    """
    hidden, context = head.fuse(streams[:, :-1]), _Unrolled()
    for step in range(steps):
        following = embedded[:, 1 + step :]
        places = following.shape[1]  # those behind which there are so many tokens
        hidden = head(hidden, F.pad(following, (0, 0, 0, hidden.shape[1] - places)), context)
        yield hidden[:, :places]


def eagle(target: Decoder, steps: int = STEPS, decay: float = DECAY) -> Objective:
    """What a head for a target is trained with: to say what the target will say, guess after guess.

        loss = sum over the steps k of decay^k * cross entropy of the target's law and the head's

    in nats a predicted token of the window; a place where nothing can be guessed counts as 0.

    Args:
        target: the decoder; it stays as it is.
        steps: guesses, one from the other.
        decay: what a step weighs beside the one before; with 0 the first step alone counts.

    Raises:
        ValueError: no step, or a decay that is none; in training, a head that is cut over processes.
    """
    require_positive_integer("steps", steps)
    if decay != 0:
        require_positive_number("decay", decay)

    def loss(
        head: EagleHead, window: Int[Tensor, "batch window"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        if isinstance(head.norm.weight, DTensor):
            raise ValueError(
                "The head is cut over processes (Layout(sharded=True)), and its parts are asked one by one. "
                "It is small: give Layout(), which keeps it whole."
            )
        taught, counted = _taught(head, target, readable(window)), predicted(window)
        total = 0.0
        for step, (scores, law, named) in enumerate(_guesses(head, taught, steps)):
            surprise = -(law * scores.log_softmax(-1)).sum(-1)
            last = counted[:, 1 + step :]  # of the token t + 2 + step, which the window may not hold
            told = named[:, : last.shape[1]] & last
            total += decay**step * torch.where(told, surprise[:, : last.shape[1]], 0).sum()
        mean = total / counted.sum().clamp(min=1)
        return mean, mean.detach()

    name = f"EAGLE-3, {steps} steps, each {decay:g} of the one before, from target {fingerprint(target)}"
    return Objective(name, loss, lambda window: int(predicted(window).sum()))


@torch.no_grad()
def agreement_by_step(
    head: EagleHead, target: Decoder, ids: Int[Tensor, "batch window"], steps: int = STEPS
) -> list[float]:
    """How often the head's best token is the target's, at each guess if all before it were the text's.

    Raises:
        ValueError: windows too short for so many guesses.
    """
    require_positive_integer("steps", steps)
    if ids.shape[1] <= steps:
        raise ValueError(
            f"The windows have {ids.shape[1]} tokens and steps is {steps}; a window needs more tokens than "
            "steps, the first to guess from and one for each guess."
        )
    taught = _taught(head, target, ids)
    with evaluating(head):
        found = _guesses(head, taught, steps)
    return [
        (named & (scores.argmax(-1) == law.argmax(-1))).float().mean().item() for scores, law, named in found
    ]


def share_output(head: EagleHead, target: Decoder) -> None:
    """Put the target's output layer, cut to the head's tokens, into the place of the head's; it is frozen."""
    table = target.tables[-1].detach()
    head.lm_head.weight = nn.Parameter(table[head.vocabulary].to(head.norm.weight), requires_grad=False)
    head.shares_output = True


def save_eagle(file: str | Path, head: EagleHead, ranking: Int[Tensor, " vocab"]) -> None:
    """Write a head that shares its target's output layer, in bfloat16 and without that layer.

    Args:
        file: to write, as `save_checkpoint` does.
        head: it guesses the first tokens of the ranking.
        ranking: all ids of the target, as `rank_by_frequency` has them.

    Raises:
        ValueError: the head guesses others, or has an output layer of its own.
        OSError: it cannot be written.
    """
    if not head.shares_output:
        raise ValueError(
            "The head has an output layer of its own, which such a file leaves out. Let it share its "
            "target's before it is trained (share_output), or keep its state_dict."
        )
    kept = len(head.vocabulary)
    if not torch.equal(head.vocabulary.cpu(), ranking[:kept].cpu().long()):
        raise ValueError(f"The head guesses {kept} tokens that are not the first {kept} of the ranking.")
    weights = {name: weight.bfloat16() for name, weight in head.named_parameters() if name != _OUTPUT}
    save_checkpoint(file, weights | {_RANKING: ranking.int()}, {"format": _FORMAT, "kept": kept})


def load_eagle(file: str | Path, target: Decoder, kept: int | None = None) -> EagleHead:
    """A head of `save_eagle` for its target, in float32.

    Args:
        file: what was written.
        target: the decoder that the head was trained for; packed or not.
        kept: how many of the most frequent tokens it guesses; left out, as many as in training.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else or a head of another shape, or more tokens are
            asked for than there are.
    """
    weights, facts = load_checkpoint(file)
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise ValueError(f"{file} is a checkpoint, and of no head; save_eagle writes such.")
    ranking = weights.pop(_RANKING).long()
    kept = facts["kept"] if kept is None else kept
    if len(ranking) != target.config.vocab_size or not 1 <= kept <= len(ranking):
        raise ValueError(
            f"The head in {file} ranks {len(ranking)} tokens, of which {kept} are asked for, and the target "
            f"has {target.config.vocab_size}. Give the target it was trained for, and a number up to that."
        )
    head = EagleHead(target.config, ranking[:kept])
    share_output(head, target)
    own = {name: head.get_parameter(name).shape for name, _ in head.named_parameters() if name != _OUTPUT}
    if {name: weight.shape for name, weight in weights.items()} != own:
        raise ValueError(f"The head in {file} is of another shape than one for this target.")
    head.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    return head.requires_grad_(False).eval()
