"""Slots: names behind which versions of a model take turns."""

from __future__ import annotations

import time

from litestar import delete, get, post
from litestar.datastructures import State

from edge import errors
from edge.store.digest import Digest
from edge.store.slots import Slot
from runtime.activation import TRIAL_S
from runtime.api.access import needs
from runtime.api.admin import act
from runtime.api.appliance import Appliance, appliance_of
from runtime.api.call import HttpRequest
from runtime.api.describe import OPERATING, exchanges
from runtime.api.guard import caller_of
from runtime.api.parsing import parse_body
from runtime.api.schema import ActivateRequest, SlotInfo, SlotList, SlotVerdict, SlotVersion

CHANGING = (*OPERATING, errors.Untrusted, errors.SlotNotFound, errors.SlotBusy, errors.ActivationFailed)


@get("/edge/v1/slots", opt=needs("view"))
async def slots(request: HttpRequest, state: State) -> SlotList:
    """The slots that the key may use: which version serves, which was before, and which is on its way."""
    appliance, limits = appliance_of(state), caller_of(request.scope).limits
    infos = [_info(appliance, name) for name in sorted(appliance.activation.slots())]
    versions = {i.name: [v for v in (i.current, i.candidate) if v is not None] for i in infos}
    return SlotList(
        slots=[i for i in infos if limits.may_use(i.name) or all(limits.may_use(v.ref) for v in versions[i.name])]
    )


@post(
    "/edge/v1/slots/{slot:str}/activate", opt=needs("operate") | exchanges(ActivateRequest, errors=CHANGING),
    status_code=200,
)  # fmt: skip
async def activate(request: HttpRequest, state: State, slot: str) -> SlotInfo:
    """Put a model into a slot; answers when it serves there, which it does only after its golden prompts. Then it is on
    trial: a crash before `trial_s` is over brings the version before back."""
    body, _ = parse_body(await request.body(), ActivateRequest)
    appliance = appliance_of(state)
    trial_s = TRIAL_S if body.trial_s is None else body.trial_s
    async with act(request, "slot.activate", f"{slot[:64]} {body.model}", on=body.model):
        await _check_slot(request, slot)
        _check_force(request, force=body.force)
        await appliance.activation.activate(
            slot, body.model, trial_s=trial_s, within_s=body.within_s, force=body.force
        )  # fmt: skip
    return _info(appliance, slot)


@post("/edge/v1/slots/{slot:str}/rollback", opt=needs("operate") | exchanges(errors=CHANGING), status_code=200)
async def roll_back(request: HttpRequest, state: State, slot: str, force: bool = False) -> SlotInfo:
    """Have the version before serve again; answers when it does. A version on trial goes."""
    appliance = appliance_of(state)
    async with act(request, "slot.rollback", slot[:64]):
        await _check_slot(request, slot)
        _check_force(request, force=force)
        await appliance.activation.roll_back(slot, force=force)
    return _info(appliance, slot)


@delete("/edge/v1/slots/{slot:str}", opt=needs("operate") | exchanges(errors=CHANGING), status_code=204)
async def remove(request: HttpRequest, state: State, slot: str) -> None:
    """Empty a slot and forget it. Its models stay in the store as long as they have a name."""
    appliance = appliance_of(state)
    async with act(request, "slot.remove", slot[:64]):
        await _check_slot(request, slot)
        await appliance.activation.remove(slot)


async def _check_slot(request: HttpRequest, slot: str) -> None:
    """A key for some models changes no slot of others."""
    appliance, limits = appliance_of(request.app.state), caller_of(request.scope).limits
    if slot in appliance.pool.slots:
        await appliance.check_allowed(limits, slot)
    elif limits.models and not limits.may_use(slot):
        raise errors.SlotNotFound(slot, known=())


def _check_force(request: HttpRequest, *, force: bool) -> None:
    """To lower what releases are accepted is for who may do everything."""
    if force:
        caller_of(request.scope).check("admin")


def _info(appliance: Appliance, name: str) -> SlotInfo:
    slot, attempt = appliance.activation.slots()[name], appliance.activation.attempt(name)
    serving, trial = appliance.pool.slots.get(name), slot.trial
    now = attempt.phase if attempt is not None else "serving" if serving is not None else "empty"
    return SlotInfo(
        name=name,
        state=now,
        serves=serving.name if serving is not None else None,
        current=_version(slot, slot.current),
        previous=_version(slot, slot.previous),
        candidate=_version(slot, trial.candidate if trial else None),
        trial_s=trial.trial_s if trial else None,
        served_s=attempt.total_s() if attempt is not None else None,
        last=None if slot.last is None else SlotVerdict(
            outcome=slot.last.outcome, ref=slot.names.get(slot.last.digest, ""), digest=slot.last.digest,
            reason=slot.last.reason or None, age_s=max(0.0, time.time() - slot.last.time_s),
        ),
    )  # fmt: skip


def _version(slot: Slot, digest: Digest | None) -> SlotVersion | None:
    return None if digest is None else SlotVersion(ref=slot.names.get(digest, ""), digest=digest)


HANDLERS = [slots, activate, roll_back, remove]
