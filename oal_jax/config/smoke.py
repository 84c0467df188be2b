"""`smoke`: the same pipeline on tiny sizes, in seconds and without files."""

import dataclasses

from oal_jax.config import GENERATED, Config, Method, Student
from oal_jax.config.benchmarks import split_names
from oal_jax.config.class_names import CLASS_NAMES, generated_names


def shrink(config: Config) -> Config:
    """The same pipeline on tiny sizes: what `smoke` asks for. Every stage runs.

    Of files nothing is needed: data without a `data.root` are generated, and small random networks
    stand for a teacher and a Stable Diffusion that are given.
    """
    replace = dataclasses.replace
    data, teacher, generator = config.data, config.teacher, config.generator
    bundled = data.source == "bundled"
    if not bundled and not data.root:
        data = replace(data, source=GENERATED, image_size=32, channels=0, stream=False)
        known = generated_names(data.id_set)
        if not set(split_names(data.leave_out)) <= set(known):
            data = replace(data, leave_out=known[: len(data.leave_out)])
    # 32 images represent a class where there are few classes, 8 where there are many.
    classes = 16 if bundled or data.id_set not in CLASS_NAMES else len(CLASS_NAMES[data.id_set])
    if data.source == GENERATED:
        classes = len(generated_names(data.id_set))
    each = min(32, max(8, 512 // classes))
    if data.source == "own":  # whose smallest class may have fewer
        each = min(each, config.outliers.knn.features_per_class)
    knn = replace(
        config.outliers.knn,
        features_per_class=each,
        neighbour=max(1, each * 5 // 8),
        boundary_points=max(1, each // 4),
        anchors=max(1, each // 4),
        noise_rows=32,
        repeats=1,
    )
    if teacher.weights:
        sizes = {"patch": 16, "width": 64, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
        teacher = replace(teacher, weights=GENERATED, batch_size=64, image_size=0, **sizes)
    if generator.directory:
        generator = replace(generator, directory=GENERATED)
    return replace(
        config,
        data=replace(data, train_images=max(512, each * classes)),
        teacher=replace(teacher, epochs=1, views=min(teacher.views, 1)),
        generator=replace(generator, vae_epochs=1, diffusion_epochs=1),
        outliers=replace(config.outliers, knn=knn),
        latents=replace(config.latents, per_class=4 if bundled else 1, steps=4, chunk=32),
        method=_shrink_method(config.method),
        student=_shrink_student(config.student),
        train=replace(config.train, epochs=1, log_every=1),
    )


def _shrink_method(method: Method) -> Method:
    replace = dataclasses.replace
    vos = replace(method.vos, queue_size=8, samples=50)
    npos = replace(
        method.npos, queue_size=8, neighbour=4, boundary_points=4, candidates=16, per_anchor=4
    )
    return replace(method, vos=vos, npos=npos)


def _shrink_student(student: Student) -> Student:
    tiny = {"densenet": {"width": 4, "depth": 10}, "wide_resnet": {"width": 1, "depth": 10}}
    student = dataclasses.replace(student, weights="", tune="all")
    return dataclasses.replace(student, **tiny.get(student.architecture, {"width": 8}))
