"""Small tokenizers of every kind that models are published with, each with control tokens of its own kind."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minicpm_lite.language.tokenizer import train_tokenizer

WORDS = "a man and a wife, said the cat: what is </s> in a file? <|end|> of it all, or <think>.\n"
LETTERS = sorted(set(WORDS + "abcdefghijklmnopqrstuvwxyz ABC<>|/_.,!?▁"))
CONTROLS = ["<s>", "</s>", "<|end|>", "<think>", "</think>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _with_controls(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROLS[:3]])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in CONTROLS[3:]])
    return tokenizer


def _bpe() -> models.BPE:
    """Merges of sentencepiece's kind; some spell "</s>", as where a vocabulary was trained on such texts."""
    merges = [("▁", "a"), ("a", "n"), ("▁", "t"), ("▁t", "h"), ("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "▁"),
              ("s", ">"), ("i", "s"), ("<", "|")]  # fmt: skip
    joined = [left + right for left, right in merges]
    pieces = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *BYTES, *(each for each in LETTERS if each.strip()), *joined]
    )
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def byte_level() -> Tokenizer:
    return _with_controls(train_tokenizer(WORDS * 9, 330))


def prepended() -> Tokenizer:
    """As Llama 2's and MiniCPM's: a "▁" before each stretch between control tokens."""
    tokenizer = Tokenizer(_bpe())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = SENTENCEPIECE
    return _with_controls(tokenizer)


def first_only() -> Tokenizer:
    """As newer ones: a "▁" at the beginning of a text alone."""
    tokenizer = Tokenizer(_bpe())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = SENTENCEPIECE
    return _with_controls(tokenizer)


def unigram() -> Tokenizer:
    """Control tokens are pieces of the vocabulary, which texts could be cut into."""
    pieces = ["<unk>", "<s>", "</s>", "<|end|>", "▁the", "▁a", "is", "▁is", "▁man"]
    pieces += [each for each in LETTERS if each not in " \n"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -float(i % 7)) for i, piece in enumerate(pieces)], 0, False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_controls(tokenizer)


def word_pieces() -> Tokenizer:
    letters = [each for each in LETTERS if each.strip()]
    pieces = ["[UNK]", "<s>", "the", "man", "wife", "##ife", *letters, *("##" + each for each in letters)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_controls(tokenizer)


def whole_words() -> Tokenizer:
    words = ["<s>", "</s>", "<think>", "[UNK]", *WORDS.split(), *"abc", "an", "is"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_controls(tokenizer)


KINDS = {
    make.__name__: make() for make in (byte_level, prepended, first_only, unigram, word_pieces, whole_words)
}


# Vocabularies without an unknown token, that know the letters of a few words alone. Of what they lack,
# `tokenizers` says nothing, or raises a plain Exception.

MARK = "<用户>"  # a control token, in letters that none of them has
LEARNED = ["the", "cat", "sat", "hat"]


def _learned(
    model: models.Model, trainer: type, before, decoder=None, normalizer=None, **options
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if before is not None:
        tokenizer.pre_tokenizer = before
    if decoder is not None:
        tokenizer.decoder = decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([" ".join(LEARNED)] * 9, trainer(show_progress=False, **options))
    tokenizer.add_special_tokens([MARK])
    return tokenizer


def _lacking() -> dict[str, Tokenizer]:
    bpe, of_bpe = models.BPE, trainers.BpeTrainer
    blanks, space = pre_tokenizers.Whitespace, pre_tokenizers.Metaspace
    stand_ins = pre_tokenizers.ByteLevel(add_prefix_space=False)
    without_accents = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    suffixed = bpe(end_of_word_suffix="</w>")
    return {
        "words": _learned(bpe(), of_bpe, blanks(), decoders.BPEDecoder()),
        "words with ends": _learned(suffixed, of_bpe, blanks(), end_of_word_suffix="</w>"),
        "metaspace": _learned(bpe(), of_bpe, space(), decoders.Metaspace()),
        "no steps": _learned(bpe(), of_bpe, None),
        "bytes": _learned(bpe(), of_bpe, stand_ins, decoders.ByteLevel()),
        "bytes, decoders": _learned(bpe(), of_bpe, stand_ins, decoders.Sequence([decoders.ByteLevel()])),
        "bytes, no decoder": _learned(bpe(), of_bpe, stand_ins),
        "bytes, normalised": _learned(bpe(), of_bpe, None, decoders.ByteLevel(), normalizers.ByteLevel()),
        "bytes, no accents": _learned(bpe(), of_bpe, stand_ins, decoders.ByteLevel(), without_accents),
        "no byte pieces": _learned(bpe(byte_fallback=True), of_bpe, space(), decoders.Metaspace()),
        "whole words": _learned(models.WordLevel(), trainers.WordLevelTrainer, blanks()),
        "word pieces": _learned(models.WordPiece(), trainers.WordPieceTrainer, blanks()),
        "unigram": _learned(models.Unigram(), trainers.UnigramTrainer, space(), decoders.Metaspace()),
    }


LACKING = _lacking()
