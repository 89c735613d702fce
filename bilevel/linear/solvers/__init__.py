"""One solver a file; `bilevel.linear` names them all."""
