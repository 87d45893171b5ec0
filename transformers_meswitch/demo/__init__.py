"""The demo family bundled with the package: three tasks, three experts, one base, all small enough for a CPU."""
