"""Facts and plans about a graph; nothing here edits one."""
