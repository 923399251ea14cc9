// Renders conversations as Ollama does: {"template", "chats": [{"messages", "tools"}]} on stdin, a list of texts on stdout.
//
// Written after Ollama's template/template.go and api/types.go as of August 2026; no line is copied. What it mirrors:
// Go's own text/template with missingkey=zero and Ollama's functions (json, currentDate, yesterdayDate,
// toTypeScriptType); the fields that its types keep of a tool, everything else is dropped; arguments and parameters as
// maps, so that a template meets them sorted by name; a description that is never left out of its JSON; system turns
// joined into .System; neighbours of one role merged, except results of tools. What it leaves out: images, thinking,
// and the old way of templates without .Messages.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"time"
)

type kinds []string // "string" or ["string", "null"]

func (k *kinds) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*k = kinds{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(k))
}

func (k kinds) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

func (k kinds) String() string {
	if len(k) == 1 {
		return k[0]
	}
	return fmt.Sprint([]string(k))
}

type nested struct{ m map[string]property } // an ordered map in Ollama, which a template cannot range over

func (n *nested) UnmarshalJSON(data []byte) error { return json.Unmarshal(data, &n.m) }
func (n nested) MarshalJSON() ([]byte, error)     { return json.Marshal(n.m) }
func (n *nested) ToMap() (found map[string]property) {
	if n != nil {
		found = n.m
	}
	return found
}

type property struct {
	AnyOf       []property `json:"anyOf,omitempty"`
	Type        kinds      `json:"type,omitempty"`
	Items       any        `json:"items,omitempty"`
	Description string     `json:"description,omitempty"`
	Enum        []any      `json:"enum,omitempty"`
	Properties  *nested    `json:"properties,omitempty"`
}

type properties map[string]property

type arguments map[string]any

func (p properties) String() string { return written(p, p == nil) }
func (a arguments) String() string  { return written(a, a == nil) }

func written(v any, none bool) string {
	if none {
		return "{}"
	}
	b, _ := json.Marshal(v)
	return string(b)
}

type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string     `json:"type"`
			Defs       any        `json:"$defs,omitempty"`
			Items      any        `json:"items,omitempty"`
			Required   []string   `json:"required,omitempty"`
			Properties properties `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type tools []tool

func (t tools) String() string { return written(t, false) }

type message struct {
	Role, Content, Thinking string
	ToolCalls               []struct {
		ID       string
		Function struct {
			Index     int
			Name      string
			Arguments arguments
		}
	} `json:"tool_calls"`
	ToolName   string `json:"tool_name"`
	ToolCallID string `json:"tool_call_id"`
}

// collate joins the system turns, and merges neighbours of one role.
func collate(all []message) (string, []*message) {
	var system []string
	var out []*message
	for i := range all {
		m := &all[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(out); n > 0 && out[n-1].Role == m.Role && m.Role != "tool" {
			out[n-1].Content += "\n\n" + m.Content
		} else {
			out = append(out, m)
		}
	}
	return strings.Join(system, "\n\n"), out
}

func typescript(v any) string {
	p, ok := v.(property)
	if !ok {
		return "any"
	}
	var names []string
	for _, each := range p.AnyOf {
		names = append(names, typescript(each))
	}
	for _, kind := range p.Type {
		name := map[string]string{"string": "string", "number": "number", "integer": "number", "boolean": "boolean",
			"array": "any[]", "object": "Record<string, any>", "null": "null"}[kind]
		if name == "" {
			name = "any"
		}
		names = append(names, name)
	}
	if names == nil {
		return "any"
	}
	return strings.Join(names, " | ")
}

func day(back int) func(...string) string {
	return func(...string) string { return time.Now().AddDate(0, 0, -back).Format("2006-01-02") }
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	var job struct {
		Template string
		Chats    []struct {
			Messages []message
			Tools    tools
		}
	}
	check(json.NewDecoder(os.Stdin).Decode(&job))
	funcs := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) },
		"currentDate": day(0), "yesterdayDate": day(1), "toTypeScriptType": typescript}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(funcs).Parse(job.Template)
	check(err)
	texts := []string{}
	for _, chat := range job.Chats {
		var text strings.Builder
		system, messages := collate(chat.Messages)
		check(parsed.Execute(&text, map[string]any{"System": system, "Messages": messages, "Tools": chat.Tools,
			"Response": "", "Think": false, "ThinkLevel": "", "IsThinkSet": false}))
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}
