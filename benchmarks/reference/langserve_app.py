"""LangServe as its documentation has it, with the same model."""

import os

from fastapi import FastAPI
from langchain_openai import ChatOpenAI
from langserve import add_routes

app = FastAPI()
model = ChatOpenAI(model="mock", base_url=os.environ["LLM_BASE_URL"], api_key="key", stream_usage=True, max_retries=0)
add_routes(app, model, path="/chat")
