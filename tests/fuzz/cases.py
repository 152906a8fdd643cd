"""One fuzz case: a target and a seed, from which everything follows."""

import math

from fuzz import check, modules, ops
from fuzz.draw import MODES, Draw

#: What can be fuzzed: ops by name, then layers and flows by name.
TARGETS = {
    **{f"ops.{name}": name for name in ops.CALLS},
    **{name: name for name in modules.MODULES},
}
RULES = ("values", "isolation", "hostile")


def run_case(target, seed):
    """Run one case; raises ``check.Finding`` where a rule does not hold."""
    if not target.startswith("ops."):
        modules.run_case(TARGETS[target], seed)
        return
    rule = RULES[seed % len(RULES)]
    mode = "plain" if rule == "hostile" else MODES[seed // len(RULES) % len(MODES)]
    draw = Draw(seed, mode)
    call = ops.CALLS[TARGETS[target]](draw)
    if rule == "values":
        check.check_values(call, mode)
    elif rule == "isolation":
        check.check_isolation(call, draw.choice((math.nan, math.inf, -math.inf)))
    else:
        check.check_hostile(call, draw)
