"""Keeps of a benchmark run what others can compare: medians and spread, the processor, no names of machines."""

from typing import Any

KEPT_STATISTICS = ("min", "median", "iqr", "rounds")
KEPT_MACHINE = ("system", "machine", "python_version", "cpu")


def pytest_benchmark_update_json(config: object, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Trim the report: seconds by benchmark, and how many times slower than the fastest of its group."""
    machine = output_json["machine_info"]
    cpu = machine.get("cpu", {})
    results = []
    for entry in output_json["benchmarks"]:
        fastest = min(
            other["stats"]["median"] for other in output_json["benchmarks"] if other["group"] == entry["group"]
        )
        results.append(
            {
                "group": entry["group"],
                "name": entry["name"],
                "seconds": {name: entry["stats"][name] for name in KEPT_STATISTICS},
                "times_the_fastest": round(entry["stats"]["median"] / fastest, 2),
                "extra": entry["extra_info"],
            }
        )
    machine = {name: machine[name] for name in KEPT_MACHINE if name in machine}
    machine["cpu"] = {name: cpu[name] for name in ("brand_raw", "count") if name in cpu}
    output_json.clear()
    output_json.update(machine=machine, benchmarks=results)
