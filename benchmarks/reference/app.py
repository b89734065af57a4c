"""The same job the usual way: Starlette, uvicorn and `ChatOpenAI.astream()`."""

import asyncio
import os
import uuid

from langchain_openai import ChatOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

model = ChatOpenAI(model="mock", base_url=os.environ["LLM_BASE_URL"], api_key="key", stream_usage=True, max_retries=0)
sessions: set[str] = set()


async def create_session(_: Request) -> JSONResponse:
    session_id = uuid.uuid4().hex
    sessions.add(session_id)
    return JSONResponse({"session_id": session_id})


async def connect(websocket: WebSocket) -> None:
    if websocket.path_params["session_id"] not in sessions:
        await websocket.close(4404)
        return
    await websocket.accept()
    tasks: set[asyncio.Task[None]] = set()
    async for message in websocket.iter_json():
        if message["method"] == "generate":
            task = asyncio.create_task(generate(websocket, message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        elif message["method"] == "cancel":
            cancelled = [task.get_name() for task in tasks if task.cancel()]
            await websocket.send_json({"jsonrpc": "2.0", "id": message["id"], "result": {"cancelled": cancelled}})
    for task in tasks:
        task.cancel()


async def generate(websocket: WebSocket, message: dict) -> None:
    async def notify(method: str, **params: object) -> None:
        await websocket.send_json({"jsonrpc": "2.0", "method": method, "params": {"task_id": task_id, **params}})

    task_id, text = asyncio.current_task().get_name(), []
    await websocket.send_json({"jsonrpc": "2.0", "id": message["id"], "result": {"task_id": task_id}})
    try:
        async for chunk in model.astream(message["params"]["history"]):
            if chunk.content:
                text.append(chunk.content)
                await notify("text_chunk", chunk=chunk.content)
        await notify("end", final_text="".join(text))
    except Exception as error:
        await notify("error", error=str(error))


app = Starlette(
    routes=[Route("/create_session", create_session, methods=["POST"]), WebSocketRoute("/ws/{session_id}", connect)]
)
