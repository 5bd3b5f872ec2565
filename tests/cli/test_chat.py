"""A conversation in the terminal."""

import io

import pytest
from shell import SHAPE, TEXT, says

from minicpm_lite import ModelConfig
from minicpm_lite.cli import main
from minicpm_lite.language.chat import Chat, chatml, minicpm_chat
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
    out, err = capsys.readouterr()
    assert out == "> " + "\n> ".join([*answers, ""])
    assert err.startswith("The model has no chat template, so it is asked in ChatML.")


def test_a_question_without_room_does_not_end_the_talk(at_home, capsys, monkeypatch):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 512}
    save_pretrained(Decoder(ModelConfig(**shape)), "model", train_tokenizer(TEXT, 300))
    talk = Chat(load_pretrained("model"), load_tokenizer("model"), chatml, room=200)
    answers = ["".join(talk.answer(question, 8)) for question in ("It is?", "And?")]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"It is?\n{'long ' * 300}\nAnd?\n"))
    assert main(["chat", "model", "--max-new-tokens", "8", "--room", "200"]) == 0
    out, err = capsys.readouterr()
    assert out == f"> {answers[0]}\n> > {answers[1]}\n> "
    assert err.count("The conversation and its answer need room for") == 1 and err.count("\n") == 2


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
    assert capsys.readouterr() == (f"> {answer}\n> ", "")


def test_an_answer_has_half_of_the_room_at_most(at_home, capsys, monkeypatch):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 300}
    save_pretrained(Decoder(ModelConfig(**shape)), "model", train_tokenizer(TEXT, 300))
    talk = Chat(load_pretrained("model"), load_tokenizer("model"), chatml, room=300)
    answer = "".join(talk.answer("It is?", 150))
    monkeypatch.setattr("sys.stdin", io.StringIO("It is?\n"))
    assert main(["chat", "model"]) == 0
    assert capsys.readouterr().out == f"> {answer}\n> "


@pytest.mark.parametrize("given", ["minicpm", "own.jinja"])
def test_another_template_and_where_an_answer_ends(at_home, capsys, monkeypatch, given):
    shape = SHAPE | {"init_std": 0.5, "max_position_embeddings": 512}
    save_pretrained(
        Decoder(ModelConfig(**shape)), "model", train_tokenizer(TEXT, 300), chat_template="not this one"
    )
    (at_home / "own.jinja").write_text("{{ messages[-1].content }}!")
    template = minicpm_chat if given == "minicpm" else lambda messages: f"{messages[-1]['content']}!"
    model, tokenizer = load_pretrained("model"), load_tokenizer("model")
    whole = "".join(Chat(model, tokenizer, template, room=400).answer("It is?", 8))
    monkeypatch.setattr("sys.stdin", io.StringIO("It is?\n"))
    words = ["--max-new-tokens", "8", "--room", "400", "--template", given, "--stop", whole[-1]]
    assert main(["chat", "model", *words]) == 0
    assert capsys.readouterr() == (f"> {whole[: whole.index(whole[-1])]}\n> ", "")


def test_what_is_no_template(at_home, capsys):
    save_pretrained(Decoder(ModelConfig(**SHAPE)), "model", train_tokenizer(TEXT, 300))
    (at_home / "wrong.jinja").write_text("{% for %}")
    says(capsys, ["chat", "model", "--template", "llama"], "There is no chat template llama; expected chatml")
    says(capsys, ["chat", "model", "--template", "wrong.jinja"], "The chat template is no program in Jinja")
