"""The bilevel problem, and the stages that train."""
