"""Three miniature skills from grammars: coding, database, os."""
