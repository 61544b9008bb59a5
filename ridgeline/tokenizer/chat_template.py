"""Chat templates: the model's own jinja2 program that writes a conversation as one prompt.

A template comes with the model, so it is somebody else's code: it runs in jinja2's immutable sandbox, which
refuses private attributes and changes to what it is given. Filters, globals and whitespace rules are those of
`transformers`, for which the templates are written. jinja2 is imported by the first template.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from ridgeline.errors import RequestError, TokenizerError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_template(source: str) -> Callable[[Mapping[str, Any]], str]:
    """The template as a function of its variables.

    Raises TokenizerError if it is not valid. The function raises RequestError if the template does not accept
    the conversation, TokenizerError if it tries what the sandbox forbids.
    """
    import jinja2

    try:
        template = _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(
            f"the chat template is not valid jinja2: {error}; write the prompt yourself and use generate"
        ) from None
    return functools.partial(_render, template)


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    from jinja2.exceptions import SecurityError

    try:
        return template.render(variables)
    except SecurityError as error:
        raise TokenizerError(
            f"the chat template does what the sandbox forbids: {error}; do not trust this model file"
        ) from None
    except Exception as error:  # whatever a foreign program can raise
        raise RequestError(
            f"the chat template does not accept these messages: {error or type(error).__name__}; expected a "
            'list such as [{"role": "user", "content": "..."}] with the roles the model was trained for'
        ) from error


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's words for training: here, its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own escapes < > & for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
