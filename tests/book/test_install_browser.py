"""The browser installer: silent when there is nothing to do, one sentence when nothing helps."""

from subprocess import CompletedProcess

import install_browser


def test_silent_when_a_browser_starts(capsys):
    assert install_browser.main(usable=lambda: True, run=None) == 0
    assert capsys.readouterr() == ("", "")


def test_stops_at_the_first_command_that_helps():
    answers = iter([False, True])
    commands = []

    def run(command, **options):
        commands.append(command)
        return CompletedProcess(command, 0)

    assert install_browser.main(usable=lambda: next(answers), run=run) == 0
    assert len(commands) == 1 and commands[0][1:] == ["-m", "playwright", "install", "chromium"]


def test_says_what_to_do_when_nothing_helps(capsys):
    assert (
        install_browser.main(usable=lambda: False, run=lambda command, **o: CompletedProcess(command, 1)) == 1
    )
    message = capsys.readouterr().err
    assert "python -m playwright install chromium" in message and "CHROMIUM" in message


def test_apt_get_only_for_root(monkeypatch):
    monkeypatch.setattr(install_browser.os, "geteuid", lambda: 1000, raising=False)
    assert not any("apt-get" in command for command in install_browser.install_commands())
