-- A validator's store as sn29 made it when its schema was 2, with a row or two.
create table meta(key text primary key, value text not null) strict;
create table claim(key text primary key, block integer not null, hotkey text not null) strict;
create table verdict(
  hotkey text, block integer, data blob, rules text, outcome text not null,
  primary key (hotkey, block, data, rules)) strict;
create table failure(hotkey text, block integer, data blob, count integer not null,
  primary key (hotkey, block, data)) strict;
create table loss(
  content_id text, tokenizer_id text, profile text, sample text,
  nats real not null, tokens integer not null, reason text not null,
  primary key (content_id, tokenizer_id, profile, sample)) strict, without rowid;
create table round(block integer primary key, plan text not null, record text, weights text) strict;
create table standing(round integer, competition text, model text, hotkey text not null, weight real not null,
  primary key (round, competition, model)) strict;
create table publication(block integer primary key, round integer not null, weights text not null) strict;
insert into meta values ('schema', '2'), ('chain', '0xabc netuid 29');
insert into claim values ('content', 20, '5Bob');
insert into publication values (7561, 7560, '{"ann": 1.0}');
insert into round values (7920, '{"block": 7920}', null, null);
