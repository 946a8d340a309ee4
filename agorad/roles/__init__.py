"""What a node can be. Each module has ``async def run(node: Node) -> None``; only worker needs torch."""
