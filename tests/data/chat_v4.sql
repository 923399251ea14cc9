-- A chat's database of version 4, as `.dump` writes it.
PRAGMA user_version = 4;
PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE conversations (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL, created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
INSERT INTO "conversations" VALUES(1,'first-token','2026-11-29 13:33:45');
INSERT INTO "conversations" VALUES(2,'second-token','2026-11-29 13:33:46');
CREATE TABLE messages (
  id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL REFERENCES conversations,
  parent INTEGER REFERENCES messages, role TEXT NOT NULL CHECK (role IN ('system', 'user', 'assistant')),
  content TEXT NOT NULL, model TEXT, status TEXT, ttft REAL, seconds REAL,
  prompt_tokens INTEGER, completion_tokens INTEGER, created TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, dropped INTEGER NOT NULL DEFAULT 0, note TEXT);
INSERT INTO "messages" VALUES(1,1,NULL,'system','You are a maths tutor.',NULL,NULL,NULL,NULL,NULL,NULL,'2026-11-29 13:33:45',0,NULL);
INSERT INTO "messages" VALUES(2,1,1,'user','What is 52 - 17?',NULL,NULL,NULL,NULL,NULL,NULL,'2026-11-29 13:33:45',0,NULL);
INSERT INTO "messages" VALUES(3,1,2,'assistant','Answer: 45','tutor','done',0.0312,0.128,38,35,'2026-11-29 13:33:45',0,NULL);
INSERT INTO "messages" VALUES(4,1,2,'assistant','Answer: 35','tutor','done',0.0312,0.128,38,35,'2026-11-29 13:33:45',0,NULL);
INSERT INTO "messages" VALUES(5,1,4,'user','And 30 + 41? “Grüße” 😀 it''s; fine',NULL,NULL,NULL,NULL,NULL,NULL,'2026-11-29 13:33:45',0,NULL);
INSERT INTO "messages" VALUES(6,1,5,'assistant','Answer: 7','tutor','failed',0.0312,0.128,38,35,'2026-11-29 13:33:45',0,'the server broke off; press retry');
INSERT INTO "messages" VALUES(7,2,NULL,'user','Hello',NULL,NULL,NULL,NULL,NULL,NULL,'2026-11-29 13:33:46',0,NULL);
INSERT INTO "messages" VALUES(8,2,7,'assistant','Hello!','tutor','done',0.0312,0.128,38,35,'2026-11-29 13:33:46',0,NULL);
CREATE TABLE votes (
  message INTEGER PRIMARY KEY REFERENCES messages, vote INTEGER CHECK (vote IN (-1, 1)),
  correction TEXT, changed TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
INSERT INTO "votes" VALUES(3,-1,'Answer: 35','2026-11-29 13:33:46');
INSERT INTO "votes" VALUES(4,1,NULL,'2026-11-29 13:33:46');
INSERT INTO "votes" VALUES(8,NULL,NULL,'2026-11-29 13:33:46');
CREATE INDEX by_token ON conversations (token);
CREATE INDEX by_conversation ON messages (conversation);
CREATE INDEX by_parent ON messages (parent);
COMMIT;
