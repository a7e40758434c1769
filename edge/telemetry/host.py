"""Gauges of the machine and of this process. What a board cannot tell is left out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from . import semconv
from .metrics import Registry

_HWMON = Path("/sys/class/hwmon")
_THERMAL = Path("/sys/class/thermal")


class CpuMeter:
    """Share of all cores' time that was used since the last reading, 0 to 1. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy_s, self._all_s = _cpu_seconds()
        self._share = 0.0
        self._read_at = time.monotonic()

    def read(self) -> float:
        """The share since the last reading; within half a second of that, its answer again."""
        with self._lock:
            if (now := time.monotonic()) - self._read_at < 0.5:
                return self._share
            busy_s, all_s = _cpu_seconds()
            if all_s > self._all_s:
                self._share = max(0.0, min(1.0, (busy_s - self._busy_s) / (all_s - self._all_s)))
            self._busy_s, self._all_s, self._read_at = busy_s, all_s, now
            return self._share


def _cpu_seconds() -> tuple[float, float]:
    import psutil  # 15 ms, spent only where gauges are read

    times = psutil.cpu_times()._asdict()
    # guest time is already in user time (proc_stat(5)); idle and iowait are what was not used
    total = sum(value for name, value in times.items() if not name.startswith("guest"))
    return total - times["idle"] - times.get("iowait", 0.0), total


def available_memory_bytes() -> float:
    """Memory that new work can have without swapping."""
    import psutil

    return float(psutil.virtual_memory().available)


def process_memory_bytes() -> float:
    """Resident memory of this process."""
    import psutil

    return float(psutil.Process(os.getpid()).memory_info().rss)


def temperature_c(*, hwmon: Path = _HWMON, thermal: Path = _THERMAL) -> float | None:
    """The hottest sensor of the machine in degrees Celsius, or None where none can be read.

    Source: Linux kernel, Documentation/hwmon/sysfs-interface and thermal/sysfs-api: millidegrees Celsius.
    """
    paths = [*hwmon.glob("hwmon*/temp*_input"), *thermal.glob("thermal_zone*/temp")]
    readings = [value for path in paths if (value := _millidegrees(path)) is not None]
    # A sensor that is not wired reads as absolute zero or as thousands of degrees.
    plausible = [value / 1000 for value in readings if -40_000 <= value <= 150_000]
    return max(plausible, default=None)


def _millidegrees(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # a sensor may vanish, sleep or answer nothing; the others still count
        return None


def watch_host(registry: Registry) -> None:
    """Add the gauges of the machine and of this process."""
    cpu = CpuMeter()
    started = time.monotonic()
    gauge = registry.gauge
    gauge(semconv.CPU_UTILIZATION, unit="1", text="Share of all cores in use.").watch(cpu.read)
    gauge(semconv.MEMORY_AVAILABLE, unit="By", text="Memory that new work can have.").watch(available_memory_bytes)
    gauge(semconv.PROCESS_MEMORY, unit="By", text="Resident memory of the server.").watch(process_memory_bytes)
    gauge(semconv.TEMPERATURE, unit="Cel", text="Hottest sensor of the machine.").watch(temperature_c)
    gauge(semconv.UPTIME, unit="s", text="Since the appliance started.").watch(lambda: time.monotonic() - started)
