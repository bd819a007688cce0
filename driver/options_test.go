package driver

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the options table in README.md")

// TestReadmeListsTheOptions keeps README's table equal to the code's.
func TestReadmeListsTheOptions(t *testing.T) {
	const path, begin, end = "../README.md", "<!-- options:", "<!-- end options -->"
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(raw), begin)
	note, rest, ok2 := strings.Cut(rest, "\n")
	got, tail, ok3 := strings.Cut(rest, end)
	if !ok || !ok2 || !ok3 {
		t.Fatal("README.md has no place for the options")
	}
	var want strings.Builder
	want.WriteString("| option | also as | default | meaning |\n|---|---|---|---|\n")
	for _, o := range Options() {
		aliases := ""
		for i, a := range o.Aliases {
			if i > 0 {
				aliases += ", "
			}
			aliases += "`" + a + "`"
		}
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", o.Key, aliases, o.Default, o.Help)
	}
	if got == want.String() {
		return
	}
	if !*update {
		t.Fatalf("README.md says:\n%s\nthe code:\n%s\nrun go test ./driver -update", got, want.String())
	}
	if err := os.WriteFile(path, []byte(head+begin+note+"\n"+want.String()+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}
