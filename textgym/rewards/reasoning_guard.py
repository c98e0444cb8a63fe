"""What a scorer of reasoning-gym may not do with a model's answer: run it.

Nine scorers (0.1.25) evaluate the answer as Python, four by `eval`, five by SymPy's `parse_expr`,
which ends in `eval`. So an answer can run any code, and, where the scorer's variables are in
sight, quote the right answer: `entry['answer']`. In the workers `eval` is `ast.literal_eval`
in these modules, and SymPy is given nothing but arithmetic. For an honest answer the scores are the
same, which the tests compare.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

EVALUATES = re.compile(r"\b(?:eval|exec|__import__|parse_expr|sympify|lambdify)\s*\(")
BY_EVAL = {
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
}
BY_SYMPY = {
    "reasoning_gym.algebra.intermediate_integration",
    "reasoning_gym.algebra.polynomial_multiplication",
    "reasoning_gym.algebra.simple_integration",
    "reasoning_gym.games.countdown",
    "reasoning_gym.games.puzzle24",
}
# These evaluate what the library wrote itself, or have a `parse_expr` of their own that does not.
HARMLESS = {
    "reasoning_gym.algorithmic.number_sorting",
    "reasoning_gym.arithmetic.basic_arithmetic",
    "reasoning_gym.arithmetic.bitwise_arithmetic",
    "reasoning_gym.code.codeio",
    "reasoning_gym.logic.propositional_logic",
}
# Of SymPy's names an answer may use these; any name of one letter is a variable. Some right answers
# of intermediate_integration are written with Integral.
FUNCTIONS = set(
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth sech csch asinh "
    "acosh atanh exp log ln sqrt cbrt Abs abs sign erf pi oo Rational Integer Float "
    "Integral".split()
)
ARITHMETIC = re.compile(r"[0-9A-Za-z_+\-*/^().,\s]*")
NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def vet(dataset: Any) -> None:
    """Check that the code of a dataset is known not to run answers.

    Raises:
        RuntimeError: If its module evaluates something and is not known here, as after an update.
    """
    module = inspect.getmodule(type(dataset))
    name = getattr(module, "__name__", "")
    if name in BY_EVAL | BY_SYMPY | HARMLESS:
        return
    if module is None or EVALUATES.search(inspect.getsource(module)):
        raise RuntimeError(
            f"the module {name!r} of reasoning-gym evaluates code, and it is not known whether it "
            "evaluates the model's answers: score this dataset with textgym.sandbox, or use "
            "reasoning-gym 0.1.25"
        )


def disarm() -> None:
    """Take the evaluation of answers out of the library, for the rest of the process."""
    module: Any
    for name in BY_EVAL:
        module = importlib.import_module(name)
        module.eval = ast.literal_eval
    sympy: Any = importlib.import_module("sympy")
    # Under the names by which the scorers call it: what SymPy itself parses is its own.
    arithmetic = _of_arithmetic(sympy.parse_expr)
    sympy.parse_expr = arithmetic
    for name in BY_SYMPY:
        module = importlib.import_module(name)
        if hasattr(module, "parse_expr"):
            module.parse_expr = arithmetic


def is_arithmetic(text: str) -> bool:
    """Whether SymPy may parse a text: numbers, operators, variables and elementary functions.

    No attribute, index, string, keyword or double underscore gets through, so there is no way from
    here to other code. Linear in the text.
    """
    if not ARITHMETIC.fullmatch(text) or re.search(r"\.(?!\d)", text):
        return False
    return all(len(name) == 1 or name in FUNCTIONS for name in NAME.findall(text))


def _of_arithmetic(parse: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse)
    def arithmetic(text: str, *args: Any, **options: Any) -> Any:
        if not is_arithmetic(text):
            raise ValueError("expected arithmetic")
        return parse(text, *args, **options)

    return arithmetic
