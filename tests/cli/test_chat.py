"""A conversation in the terminal."""

import io

import pytest
from shell import SHAPE, TEXT

from minicpm_lite import ModelConfig
from minicpm_lite.cli import main
from minicpm_lite.language.chat import Chat, chatml
from minicpm_lite.language.decoder import Decoder
from minicpm_lite.language.templates import chat_template
from minicpm_lite.language.tokenizer import train_tokenizer
from minicpm_lite.pretrained.checkpoints import load_pretrained, load_tokenizer, save_pretrained


@pytest.mark.parametrize("end", ["", "\n"], ids=["end of input", "empty line"])
def test_questions_and_answers(at_home, capsys, monkeypatch, end):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 512}
    save_pretrained(Decoder(ModelConfig(**shape)), "model", train_tokenizer(TEXT, 300))
    talk = Chat(load_pretrained("model"), load_tokenizer("model"), chatml, room=400)
    answers = ["".join(talk.answer(question, 8)) for question in ("It is?", "And?")]
    monkeypatch.setattr("sys.stdin", io.StringIO("It is?\nAnd?\n" + end))
    assert main(["chat", "model", "--max-new-tokens", "8", "--room", "400"]) == 0
    assert capsys.readouterr().out == "> " + "\n> ".join([*answers, ""])


def test_a_question_without_room_does_not_end_the_talk(at_home, capsys, monkeypatch):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 512}
    save_pretrained(Decoder(ModelConfig(**shape)), "model", train_tokenizer(TEXT, 300))
    talk = Chat(load_pretrained("model"), load_tokenizer("model"), chatml, room=200)
    answers = ["".join(talk.answer(question, 8)) for question in ("It is?", "And?")]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"It is?\n{'long ' * 300}\nAnd?\n"))
    assert main(["chat", "model", "--max-new-tokens", "8", "--room", "200"]) == 0
    out, err = capsys.readouterr()
    assert out == f"> {answers[0]}\n> > {answers[1]}\n> "
    assert err.startswith("The conversation and its answer need room for") and err.count("\n") == 1


def test_a_model_s_own_template_and_what_it_is_told_first(at_home, capsys, monkeypatch):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 512}
    source = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    vocabulary = train_tokenizer(TEXT, 300)
    save_pretrained(Decoder(ModelConfig(**shape)), "model", vocabulary, chat_template=source)
    talk = Chat(load_pretrained("model"), load_tokenizer("model"), chat_template(source), room=400)
    talk.messages = [{"role": "system", "content": "Be kind."}]
    answer = "".join(talk.answer("It is?", 8))
    monkeypatch.setattr("sys.stdin", io.StringIO("It is?\n"))
    assert main(["chat", "model", "--max-new-tokens", "8", "--room", "400", "--system", "Be kind."]) == 0
    assert capsys.readouterr().out == f"> {answer}\n> "
