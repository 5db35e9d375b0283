"""Key files: who may read them, what is in them, and who is authorized by them."""

import shutil

import pytest

from headrace.engine import keys
from headrace.engine.cli import main
from headrace.engine.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


def test_the_command_makes_a_pair_for_the_engine_and_one_for_each_client(folder, capsys):
    assert main(["keys", str(folder), "alice", "bob"]) == 0
    written = {folder / line for line in capsys.readouterr().out.split()}
    assert written == {path for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in written} == {
        "server.key", "server.key_secret",
        "clients/alice.key", "clients/alice.key_secret", "clients/bob.key", "clients/bob.key_secret",
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    pairs = [keys.read_server(folder), *(keys.read_pair(folder / f"clients/{name}.key_secret") for name in ("alice", "bob"))]
    assert len(set(pairs)) == 3
    assert [pair.public for pair in pairs] == [
        keys.read_public(folder / "server.key"), *(keys.read_public(folder / f"clients/{name}.key") for name in ("alice", "bob"))
    ]  # fmt: skip


def test_another_client_leaves_the_pairs_that_are_there(folder, capsys):
    keys.make(folder, ["alice"])
    before = {path: path.read_bytes() for path in folder.rglob("*.key*")}
    assert keys.make(folder, ["bob"]) == [folder / "clients/bob.key", folder / "clients/bob.key_secret"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert main(["keys", str(folder)]) == 0
    assert "has its keys already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"alice\.key is there already: choose another name"):
        keys.make(folder, ["carol", "alice"])
    assert not (folder / "clients/carol.key").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 200])
def test_a_name_that_is_no_file_of_the_folder_is_refused(folder, name):
    with pytest.raises(UserError, match="is no name for a key"):
        keys.make(folder, [name])
    assert not folder.exists()


def test_a_secret_that_others_can_read_is_refused(folder):
    keys.make(folder, ["alice"])
    secret = folder / "clients/alice.key_secret"
    for mode in (0o640, 0o604, 0o620):
        secret.chmod(mode)
        with pytest.raises(UserError, match=f"can be read by others: chmod 600 {secret}"):
            keys.read_pair(secret)
    secret.chmod(0o400)
    assert keys.read_pair(secret).public == keys.read_public(folder / "clients/alice.key")


def test_a_file_that_holds_no_pair_says_so(folder, tmp_path):
    keys.make(folder, ["alice", "bob"])
    alice = folder / "clients/alice.key_secret"
    with pytest.raises(UserError, match="holds no secret key: name the file that ends in"):
        keys.read_pair(folder / "clients/alice.key")
    with pytest.raises(UserError, match="no secret key can be read there"):
        keys.read_pair(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no ZeroMQ certificate"):
        keys.read_public(tmp_path / "nothing")
    whole = alice.read_text()
    alice.write_text(whole.replace(keys.read_pair(alice).public.decode(), keys.read_public(folder / "clients/bob.key").decode()))
    with pytest.raises(UserError, match="does not belong to the secret one"):
        keys.read_pair(alice)
    alice.write_text(whole.replace('public-key = "', 'public-key = "short'))
    with pytest.raises(UserError, match="not 40 characters of Z85"):
        keys.read_pair(alice)
    with pytest.raises(UserError, match=r"`headrace keys .* NAME` makes it"):
        keys.read_server(tmp_path)


def test_who_is_authorized_follows_the_files(folder, tmp_path):
    keys.make(folder, ["alice", "bob"])
    alice, bob = (keys.read_public(folder / f"clients/{name}.key") for name in ("alice", "bob"))
    authorized = keys.Authorized(folder)
    assert alice in authorized and bob in authorized and b"" not in authorized
    (folder / "clients/alice.key").rename(tmp_path / "alice.key")
    assert alice not in authorized and bob in authorized
    (tmp_path / "alice.key").rename(folder / "clients/alice.key")
    (folder / "clients/rubbish.key").write_bytes(b"public-key = \xff\n")
    assert alice in authorized
    shutil.rmtree(folder / "clients")
    assert alice not in authorized and bob not in authorized


def test_the_engines_own_key_authorizes_nobody(folder):
    keys.make(folder, [])
    assert keys.read_public(folder / "server.key") not in keys.Authorized(folder)
