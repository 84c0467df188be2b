"""Rendering of the page templates, which are in the folder `templates`.

A page loads nothing from elsewhere, so it opens without a network.
"""

import jinja2


def render(template: str, **values: object) -> str:
    """The HTML of a template. Values are escaped, except where the template says `safe`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oal_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
