"""`edge sign`: vouch for a package, so that devices may insist on it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edge.cli.main import settings_from
from edge.cli.models import print_json
from edge.cli.notes import note
from edge.cli.options import complete_models, human_size, json_option, open_store, store_option
from edge.errors import ConfigError
from edge.store.files import translated
from edge.trust.keys import TrustFiles

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("ref", metavar="MODEL", shell_complete=complete_models)
@click.option("--key", required=True, type=_FILE, help="PEM file of the private key, on P-256, P-384 or P-521.")
@click.option("--certificate", type=_FILE, help="PEM file of the key's certificate, where devices trust its authority.")
@click.option("--chain", type=_FILE, multiple=True, help="Certificates between that one and its authority.")
@click.option(
    "--release", type=click.IntRange(min=1),
    help="Rises with each release of this name.  [default: one more than the last that was signed here]",
)  # fmt: skip
@store_option
@json_option
def sign(
    ref: str, *, key: Path, certificate: Path | None, chain: tuple[Path, ...], release: int | None,
    store_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Sign MODEL: its files, its manifest, its name and a release number.

    The signature is attached to the package, with a bill of materials (CycloneDX), and goes wherever the package goes:
    to a registry, into a bundle. It is OpenSSF model-signing's, so `model_signing verify` reads it too. Nothing is sent
    anywhere.

    A device that knows the public key (edge trust add) and has the setting trust=enforce loads nothing else. It refuses
    releases that are older than one that it served: so let the number rise, also when you sign on several machines.

    \b
    Examples:
      openssl ecparam -name prime256v1 -genkey -noout -out key.pem
      openssl ec -in key.pem -pubout -out plant.pem          # for the devices
      edge sign smollm2:135m-instruct --key key.pem
      edge sign smollm2:135m-instruct --key key.pem --release 12
      edge sign smollm2:135m-instruct --key leaf.key --certificate leaf.pem --chain authority.pem
    """
    from quantize.sbom import attach_sbom
    from quantize.signing import SigningKey, sign_model

    if chain and certificate is None:
        raise click.UsageError("--chain goes with --certificate.")
    store, own = open_store(store_dir), TrustFiles.of(settings_from())
    model = store.get(ref)
    number = release if release is not None else own.last_signed(str(model.ref)) + 1
    click.echo(f"reading {human_size(model.size_bytes)}", err=True)
    bill = attach_sbom(store, model)
    sign_model(store, model.ref, SigningKey(key, _password(key), certificate, chain), release=number)
    own.note_signed(str(model.ref), number)
    note("model.sign", f"{model.ref} release {number}", store_dir=store_dir)
    if as_json:
        print_json({"ref": str(model.ref), "digest": str(model.digest), "release": number, "sbom": str(bill.digest)})
    else:
        click.echo(f"{model.ref} is signed as release {number}")


def _password(key: Path) -> str | None:
    with translated(key, "Reading"), key.open("rb") as file:
        is_encrypted = b"ENCRYPTED" in file.read(4096)
    if not is_encrypted:
        return None
    if not sys.stdin.isatty():
        raise ConfigError(f"{key} is encrypted, and nobody is at a terminal to give its password.")
    password: str = click.prompt(f"Password of {key}", hide_input=True, err=True)
    return password
