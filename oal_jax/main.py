"""`python -m oal_jax.main --config FILE [--workdir DIR] [--config.a.b=VALUE ...] [--stage NAME]`.

`python -m oal_jax.main --compare RUN1 RUN2 ... [--output FILE.html]` compares finished runs, seeds
of one config together; a CSV file in OpenOOD's layout counts as one more.

Exit codes: 0 done; 2 a mistake of the user's, in one line on stderr; 130 Ctrl-C; 143 SIGTERM, after
saving; 1 any other error. If one process of several fails, the others end with its code.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from oal_jax.config.flags import parse, spelled, usage
from oal_jax.runtime import processes, startup
from oal_jax.runtime.command import guard


def run(argv: Sequence[str]) -> None:
    """Run the stages of a config and print the table; or compare finished runs."""
    arguments = [spelled(argument) for argument in argv[1:]]
    names = {argument.partition("=")[0] for argument in arguments}
    if "--compare" in names and not names & {"--help", "--h"}:
        from oal_jax.report import compare

        return compare.run(arguments)
    startup.use_compilation_cache()  # before JAX is imported, which a config file may do
    values = parse(argv)
    return print(usage(__doc__, values)) if values.help else _run_stages(values)


def _run_stages(values: flags.FlagValues) -> None:
    from oal_jax.runtime import distributed  # imports JAX, so only after the flags are checked

    names = "coordinator num_processes process_id distributed join_timeout heartbeat_timeout"
    distributed.initialize(*(values[name].value for name in names.split()))
    from oal_jax.report import summary
    from oal_jax.runtime import profile
    from oal_jax.stages import check_report
    from oal_jax.stages import run as pipeline

    reuse = [Path(values.reuse)] if values.reuse else []
    if values.check:
        return check_report.run(values.config, reuse)
    name = Path(config_flags.get_config_filename(values["config"])).stem
    workdir = Path(values.workdir or Path("runs") / name)
    options = {"only": values.stage, "force": values.force, "reuse": reuse}
    if values.profile and processes.is_main():
        options["watch"] = lambda stage: profile.trace(workdir / "profile" / stage)
    with processes.only_main_prints():
        pipeline.run(values.config, workdir, **options)
        if values.stage in (None, "report"):
            summary.show(workdir / "report", values.config.smoke)


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
