"""What can be wrong with `--listen` and its keys is one line and a quick end; one port a tokenizer, which its successors take too."""

import re
import socket

import pytest

from headrace.engine.names import port_of
from tests.e2e.test_start import refused
from tests.guests import Keys, Listening
from tests.serving import free_port


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys", "alice")


def test_listening_without_keys_names_the_command_that_makes_them():
    line = refused("--port", "0", "--listen", "tcp://127.0.0.1:0")
    assert "`headrace keys DIR NAME`" in line and "--keys DIR" in line


def test_a_folder_without_keys_names_the_command_that_makes_them(tmp_path):
    line = refused("--port", "0", "--listen", "tcp://127.0.0.1:0", "--keys", str(tmp_path))
    assert f"--keys {tmp_path} has no server.key_secret: `headrace keys {tmp_path} NAME` makes it" in line


def test_a_secret_that_others_can_read_is_refused(keys):
    secret = keys.folder / "server.key_secret"
    secret.chmod(0o644)
    assert f"chmod 600 {secret}" in refused("--port", "0", "--listen", "tcp://127.0.0.1:0", "--keys", str(keys.folder))


def test_an_address_that_is_taken_or_is_none_is_named(keys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        line = refused("--port", "0", "--listen", address, "--keys", str(keys.folder), seconds=20)
        assert f"--listen {address}" in line and "in use" in line
    assert "--listen tcp://nowhere.invalid:1" in refused(
        "--port", "0", "--listen", "tcp://nowhere.invalid:1", "--keys", str(keys.folder), seconds=20
    )


async def test_tokenizers_take_the_ports_from_the_given_one_on(keys):
    first = free_port()
    with Listening(keys, listen=f"tcp://127.0.0.1:{first}", tokenizers=3) as engine:
        assert [port_of(address) for address in engine.addresses()] == [first, first + 1, first + 2]
        for address in engine.addresses():
            client = await engine.guest("alice")
            assert sorted(client._visits) == engine.addresses(), address
            client.close()


async def test_freely_chosen_ports_stay_when_the_model_is_exchanged(keys):
    with Listening(keys, tokenizers=2, admin_key="operator") as engine:
        before = engine.addresses()
        client = await engine.guest("alice")
        said = len(engine.lines)
        assert engine.ask("/admin/reload", {}, {"Authorization": "Bearer operator"})[0] == 200
        assert sum(bool(re.search("direct clients are received", line)) for line in engine.lines[said:]) == 2
        assert engine.addresses() == before
        assert (await client.describe()).name == engine.model
        client.close()
