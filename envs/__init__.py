"""The environments, one task family a file; `textgym.registry` lists their ids."""
