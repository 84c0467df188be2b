"""Rendering of the page templates, which are in the folder `templates`, and of names in Markdown.

A page loads nothing from elsewhere, so it opens without a network.
"""

import re

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


def markdown(name: str) -> str:
    """A name as plain text of a Markdown page: it makes no link, tag, row or line of its own."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    return re.sub(r"([\\`*_\[\]<>()#!|~&$:@])", r"\\\1", printable)
