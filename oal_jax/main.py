"""`python -m oal_jax.main --config FILE [--workdir DIR] [--config.a.b=VALUE ...] [--stage NAME]`.

`python -m oal_jax.main --compare RUN1 RUN2 ... [--output FILE.html]` compares finished runs, seeds
of one config together; a CSV file in OpenOOD's layout counts as one more.

Exit codes: 0 done; 2 a mistake of the user's, one line on stderr; 1 a training that failed or
any other error, or another process of the run that died; 130 Ctrl-C; 143 SIGTERM, after saving.
Where one process of several fails, the others end with its code.
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
    """Parse, run the pipeline, print the table; or compare finished runs."""
    arguments = [spelled(argument) for argument in argv[1:]]
    names = {argument.partition("=")[0] for argument in arguments}
    if "--compare" in names and not names & {"--help", "--h"}:
        from oal_jax.report import compare

        compare.run(arguments)
        return
    startup.use_compilation_cache()  # before JAX is imported, which a config file may do
    values = parse(argv)
    if values.help:
        print(usage(__doc__, values))
        return
    from oal_jax.runtime import distributed  # JAX starts only once the flags are known to be right

    timeouts = {name: values[name].value for name in ("join_timeout", "heartbeat_timeout")}
    distributed.initialize(
        values.coordinator,
        values.num_processes,
        values.process_id,
        detect=values.distributed,
        **{name: seconds for name, seconds in timeouts.items() if seconds is not None},
    )
    with processes.only_main_prints():
        _run(values)


def _run(values: flags.FlagValues) -> None:
    from oal_jax.evaluation.tables import format_table, read_csv
    from oal_jax.generator import flax_models
    from oal_jax.stages import run as pipeline

    flax_models.leave_torch_out()
    name = Path(config_flags.get_config_filename(values["config"])).stem
    workdir = Path(values.workdir or Path("runs") / name)
    reuse = Path(values.reuse) if values.reuse else None
    options = {"only": values.stage, "force": values.force, "reuse": reuse}
    if values.profile and processes.is_main():
        from oal_jax.runtime import profile

        options["watch"] = lambda stage: profile.trace(workdir / "profile" / stage)
    pipeline.run(values.config, workdir, **options)
    table = workdir / "report" / "ood.csv"
    if processes.is_main() and (not values.stage or values.stage == "report"):
        print(format_table(read_csv(table)))
        print(f"report: {workdir / 'report' / 'index.html'}")


if __name__ == "__main__":
    sys.exit(guard(run, sys.argv))
